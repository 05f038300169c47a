"""``profile``: what every unit of a model costs one tensor-parallel rank, for one microbatch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Final

from shardstage.cluster import Cluster, CollectiveKind
from shardstage.cost.experts import with_whole_experts
from shardstage.cost.fold import Folded
from shardstage.cost.links import Links
from shardstage.cost.reading import RECOMPUTES, Reading, Recompute, fixed_values
from shardstage.cost.readings import Read, Readings
from shardstage.cost.units import Cases, KeptOf, UnitCost, UnitCosts, costs_of_unit
from shardstage.graph import ModelGraph
from shardstage.graph.flops import forward_flops
from shardstage.graph.saved_on import saved_on
from shardstage.sharding import localize, shard

__all__ = ["RECOMPUTES", "KeptOf", "Profile", "Profiler", "Recompute", "UnitCost", "profile"]

REFERENCE_MICROBATCH: Final = 2
"""Graphs are sharded at this size: with a single sample, flattening samples and positions would keep any cut of the positions."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Costs of all units of the whole graph, in order; ``shared_elements`` are the local sizes of parameters that several units use.

    ``whole_flops`` is the forward of one microbatch on all ranks together: what MFU counts.
    """

    units: tuple[UnitCost, ...]
    shared_elements: dict[str, int]
    whole_flops: int


def profile(
    folded: Folded,
    cluster: Cluster,
    *,
    tp: int,
    microbatch: int,
    sequence: int | None,
    is_sequence_parallel: bool = False,
    replicate: Sequence[str] = (),
    is_compiled: bool = False,
    has_whole_experts: bool = False,
) -> Profile:
    """Prices the local graph of the first tensor-parallel rank, which has the largest shards."""
    profiler = Profiler(
        folded,
        cluster,
        tp=tp,
        sequence=sequence,
        is_sequence_parallel=is_sequence_parallel,
        replicate=replicate,
        is_compiled=is_compiled,
    )
    return (profiler.with_whole_experts() if has_whole_experts else profiler).at(microbatch)


class Profiler:
    """One sharding of a model, priced at any microbatch: it is sharded once, and sizes that follow the microbatch scale with it.

    ``waits_for_kernels`` as in ``costs_of_unit``; what ``readings`` hold is not sharded again.
    """

    def __init__(
        self,
        folded: Folded,
        cluster: Cluster,
        *,
        tp: int,
        sequence: int | None,
        is_sequence_parallel: bool = False,
        replicate: Sequence[str] = (),
        is_compiled: bool = False,
        waits_for_kernels: bool = False,
        readings: Readings | None = None,
    ) -> None:
        graph = folded.at(
            REFERENCE_MICROBATCH if folded.graph.is_scalable else folded.graph.microbatch,
            sequence if folded.graph.is_sequence_scalable else folded.graph.sequence,
        )
        self._folded = folded
        self._tp = tp
        self._graph = graph
        self._is_compiled = is_compiled
        self._waits_for_kernels = waits_for_kernels
        self._use(cluster)

        def localized() -> ModelGraph:
            whole = tuple(replicate)
            sharding = shard(graph, num_ranks=tp, is_sequence_parallel=is_sequence_parallel, replicate=whole)
            return localize(sharding, 0)

        self._localized = localized
        sizes = (graph.microbatch, graph.sequence, folded.kept, folded.modules)
        device = (self._device.kind, self._device.compute_capability)
        self._key = repr((tp, is_sequence_parallel, tuple(replicate), is_compiled, *device, *sizes))
        self._readings = Readings() if readings is None else readings
        self._made_for = partial(
            Profiler,
            folded,
            tp=tp,
            sequence=sequence,
            is_sequence_parallel=is_sequence_parallel,
            replicate=replicate,
            is_compiled=is_compiled,
            waits_for_kernels=waits_for_kernels,
            readings=self._readings,
        )
        self._read = self._readings.find(self._key, lambda: self._read_now(range(len(folded.kept))))

    @cached_property
    def _local(self) -> ModelGraph:
        return saved_on(self._localized(), self._device.kind, self._device.compute_capability)

    @cached_property
    def _elements(self) -> dict[str, int]:
        return {p.name: self._local.values[p.name].numel for p in self._local.parameters}

    @cached_property
    def _reading(self) -> Reading:
        folded, local = self._folded, self._local
        of_local = _positions(folded, local)
        return Reading(
            local,
            [(of_local[start], of_local[stop]) for start, stop in folded.kept],
            fixed_values(folded.graph),
            blocks=[replace(b, start=of_local[b.start], stop=of_local[b.stop]) for b in self._graph.blocks],
            is_compiled=self._is_compiled,
            modules=folded.modules,
        )

    def _read_now(self, numbers: Iterable[int]) -> Read:
        """Some units, by their numbers."""
        shared = _shared_names(self._folded, self._elements)
        return Read(
            works=tuple(self._reading.works(self._elements, shared, numbers)),
            shared_elements={name: self._elements[name] for name in shared},
            whole_flops=_whole_flops(self._folded, self._graph) / self._graph.microbatch,
        )

    def naming(self, modules: tuple[str, ...]) -> Profiler:
        """The same where selective recomputation means these modules: nothing is sharded or read again but what is kept."""
        named = copy(self)
        named._key = f"{self._key} naming {modules}"
        named._read = self._readings.find(
            named._key,
            lambda: self._read._replace(works=tuple(self._reading.naming(modules, self._read.works))),
        )
        return named

    def with_whole_experts(self) -> Profiler:
        """The same sharding where no rank cuts an expert, and each computes those of its part of the tokens."""
        graph, sequence = self._graph, self._graph.sequence
        assert sequence is not None, "can_have_whole_experts"
        part = self._folded.at(graph.microbatch, -(-sequence // self._tp))
        folded, other = self._folded, copy(self)
        for name in ("_local", "_elements", "_reading"):
            vars(other).pop(name, None)
        other._localized = lambda: with_whole_experts(self._local, part, folded.routed)
        other._key = f"{self._key} with whole experts"

        def read() -> Read:
            works, numbers = [*self._read.works], self._routed_units()
            found = other._read_now(numbers)
            for number, work in zip(numbers, found.works, strict=True):
                works[number] = work
            return found._replace(works=tuple(works))

        other._read = self._readings.find(other._key, read)
        return other

    def _routed_units(self) -> list[int]:
        """Kept units that have experts, by their numbers."""
        folded = self._folded
        return [
            number
            for number, (start, stop) in enumerate(folded.kept)
            if any(op.name in folded.routed for op in folded.graph.ops[start:stop])
        ]

    def at(self, microbatch: int, links: Links | None = None) -> Profile:
        """Costs of all units for a microbatch of so many samples; ``links`` say who shares its sequences (cp) and its experts (ep)."""
        cases = Cases.alone(microbatch) if links is None else Cases.of([microbatch], [links])
        return self.of(self.costs(cases), 0, microbatch)

    def of(self, costs: Sequence[UnitCosts], case: int, microbatch: int) -> Profile:
        """One of many cases."""
        kept = [each.at(case) for each in costs]
        return Profile(
            units=tuple(kept[unit.twin] for unit in self._folded.units),
            shared_elements=self.shared_elements,
            whole_flops=round(self._read.whole_flops * microbatch),
        )

    def costs(self, cases: Cases) -> list[UnitCosts]:
        """Costs of each kind of unit in many cases."""
        return [
            costs_of_unit(work, cases, self._device, self._links, waits_for_kernels=self._waits_for_kernels)
            for work in self._read.works
        ]

    def on(self, cluster: Cluster) -> Profiler:
        """The same sharding, priced on another cluster; read again, without names of modules, where that is of another kind."""
        if cluster.device.kind != self._device.kind:
            return self._made_for(cluster)
        other = copy(self)
        other._use(cluster)
        return other

    def _use(self, cluster: Cluster) -> None:
        kinds: tuple[CollectiveKind, ...] = ("all_reduce", "all_gather", "reduce_scatter")
        self._device = cluster.device
        self._links = {kind: cluster.collective(kind, range(self._tp)) for kind in kinds}

    @property
    def shared_elements(self) -> dict[str, int]:
        """Local sizes of parameters that several units use."""
        return self._read.shared_elements


def _positions(folded: Folded, local: ModelGraph) -> list[int]:
    """Where each op of the kept units, and their end, lie in the local graph; an op that sharding inserted goes with the one it serves."""
    position: dict[str, int] = {}
    for index, op in enumerate(local.ops):
        position.setdefault(op.name.split("@")[0], index)
    return [*(position[op.name] for op in folded.graph.ops), len(local.ops)]


def _shared_names(folded: Folded, elements: dict[str, int]) -> frozenset[str]:
    """Parameters that several units of the whole graph use: those of a kept unit's twins are others, by other names."""
    uses = Counter(
        name
        for start, stop in folded.kept
        for name in {n for op in folded.graph.ops[start:stop] for n in op.inputs if n in elements}
    )
    return frozenset(name for name, count in uses.items() if count > 1)


def _whole_flops(folded: Folded, graph: ModelGraph) -> int:
    kept = [sum(forward_flops(graph, op) for op in graph.ops[start:stop]) for start, stop in folded.kept]
    return sum(kept[unit.twin] for unit in folded.units)
