"""``Pricing``: peak bytes and a lower bound of the time of many choices, quickly."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Final

from shardstage.cluster import Cluster
from shardstage.cost import (
    Folded,
    Links,
    Profile,
    StepSetup,
    balanced,
    fold,
    least_step_s,
    profile,
    stage_memory,
)
from shardstage.graph import ModelGraph
from shardstage.graph.cuts import good_positions
from shardstage.layout import Mesh
from shardstage.plan import Precision, Recompute
from shardstage.plan.plan import Plan
from shardstage.planner.candidates import Choice

__all__ = ["Priced", "Pricing"]

ENOUGH_UNITS: Final = 16
"""With so many blocks, stages of whole blocks are balanced well enough."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Priced:
    """A choice with its stages: ``positions`` are the ops of the whole graph that they begin at."""

    choice: Choice
    profile: Profile
    setup: StepSetup
    links: Links
    positions: tuple[int, ...]
    peak_bytes: int
    least_step_s: float


class Pricing:
    """Prices choices for one graph, cluster and batch; what several choices share is computed once.

    A profile depends on (tp, sequence parallel, microbatch), the cut into stages on (tp, sequence parallel, pp, recompute).
    """

    def __init__(
        self,
        graph: ModelGraph,
        cluster: Cluster,
        *,
        num_ranks: int,
        global_batch: int,
        sequence: int | None,
        precision: Precision,
    ) -> None:
        self._cluster = cluster
        self._global_batch = global_batch
        self._sequence = sequence
        self._precision = precision
        self._folded = _fold_for(graph, num_ranks)
        self._profiles: dict[tuple[int, bool, int], Profile] = {}
        self._links: dict[Mesh, Links] = {}
        self._cuts: dict[tuple[int, bool, int, Recompute], tuple[int, ...]] = {}

    @cached_property
    def num_units(self) -> int:
        return len(self._folded.units)

    def price(self, choice: Choice) -> Priced:
        num_microbatches = -(-max(choice.shares) // choice.microbatch)
        microbatch = -(-max(choice.shares) // num_microbatches)
        priced = self._profile(choice, microbatch)
        setup = StepSetup(
            mesh=choice.mesh,
            starts=self._starts(choice, priced),
            microbatch=microbatch,
            num_microbatches=num_microbatches,
            global_batch=self._global_batch,
            sequence=self._sequence,
            zero=choice.zero,
            recompute=choice.recompute,
            schedule="1f1b",
            precision=self._precision,
            bucket_bytes=Plan.bucket_bytes,
        )
        links = self._links_of(choice.mesh)
        memory = [stage_memory(priced, setup, stage).total_bytes for stage in range(choice.mesh.pp)]
        return Priced(
            choice=choice,
            profile=priced,
            setup=setup,
            links=links,
            positions=tuple(self._folded.units[start].start for start in setup.starts),
            peak_bytes=max(memory),
            least_step_s=least_step_s(priced, setup, links),
        )

    def _links_of(self, mesh: Mesh) -> Links:
        if mesh not in self._links:
            self._links[mesh] = Links(self._cluster, mesh)
        return self._links[mesh]

    def _profile(self, choice: Choice, microbatch: int) -> Profile:
        key = (choice.mesh.tp, choice.is_sequence_parallel, microbatch)
        if key not in self._profiles:
            self._profiles[key] = profile(
                self._folded,
                self._cluster,
                tp=choice.mesh.tp,
                microbatch=microbatch,
                sequence=self._sequence,
                is_sequence_parallel=choice.is_sequence_parallel,
            )
        return self._profiles[key]

    def _starts(self, choice: Choice, priced: Profile) -> tuple[int, ...]:
        """First units of stages with nearly equal time; balance hardly depends on the microbatch, so the first one's serves all."""
        key = (choice.mesh.tp, choice.is_sequence_parallel, choice.mesh.pp, choice.recompute)
        if key not in self._cuts:
            weights = [
                unit.forward_s
                + unit.backward_s
                + unit.tp_forward_s
                + unit.tp_backward_s
                + unit.kept[choice.recompute].recompute_s
                for unit in priced.units
            ]
            self._cuts[key] = balanced(weights, choice.mesh.pp)
        return self._cuts[key]


def _fold_for(graph: ModelGraph, num_ranks: int) -> Folded:
    """Units are blocks, the unit of ZeRO's gathers, too; finer where there are too few of them to make stages of."""
    folded = fold(graph)
    if len(folded.units) >= min(num_ranks, ENOUGH_UNITS):
        return folded
    return fold(graph, boundaries=good_positions(graph))
