"""``Pricing``: what a choice of the space costs exactly; what several choices share is computed once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from shardstage.cluster import Cluster
from shardstage.cost import (
    Folded,
    Links,
    MemoryModel,
    Prediction,
    Profiler,
    StepSetup,
    fold,
    predict_step,
    step_seconds,
)
from shardstage.cost.compute import moved_s
from shardstage.cost.links import LinkCosts
from shardstage.cost.offload import has_host_room
from shardstage.cost.pipeline import SPLITTING, StageTime, bubble_s, pipeline_s
from shardstage.cost.profile import RECOMPUTES, Recompute
from shardstage.cost.readings import Readings
from shardstage.cost.stages import least_reduction_s
from shardstage.cost.units import Cases, UnitCosts
from shardstage.graph import ModelGraph
from shardstage.graph.cuts import good_positions
from shardstage.graph.recompute import StageRecompute
from shardstage.layout import AXES, Mesh
from shardstage.plan import Precision
from shardstage.plan.plan import Plan
from shardstage.planner.alike import Alike
from shardstage.planner.chain import Chain, ChainCosts, ShardingWaits
from shardstage.planner.even import EvenCuts
from shardstage.planner.figures import Figures
from shardstage.planner.recut import RunCosts, StepBound, least_beside_s, least_pipeline_s, quicker_cut
from shardstage.planner.space import Choice, Group, Savers
from shardstage.planner.stages import Cut, best_cut

Array = npt.NDArray[np.float64]

__all__ = ["Priced", "Pricing", "TooSlow", "fold_for", "is_in_parts"]

ENOUGH_UNITS: Final = 16
"""With so many blocks, stages of whole blocks are balanced well enough."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Priced:
    """A choice with its stages and its price: ``positions`` are the ops of the whole graph that the stages begin at."""

    choice: Choice
    setup: StepSetup
    positions: tuple[int, ...]
    prediction: Prediction
    savers: Savers

    @property
    def seconds(self) -> float:
        return self.prediction.step_time_s


class Pricing:
    """Prices choices for one graph, cluster and batch."""

    def __init__(
        self,
        graph: ModelGraph,
        cluster: Cluster,
        *,
        num_ranks: int,
        global_batch: int,
        sequence: int | None,
        precision: Precision,
        is_compiled: bool = False,
        modes: tuple[StageRecompute, ...] = RECOMPUTES,
        modules: tuple[str, ...] = (),
        readings: Readings | None = None,
    ) -> None:
        self.cluster = cluster
        self.costs = LinkCosts(cluster)
        self.folded: Folded = fold_for(graph, num_ranks, modules)
        self.modes: tuple[Recompute, ...] = tuple(m for m in RECOMPUTES if m in modes) or RECOMPUTES
        self._asked = modes[0] if len(modes) == 1 else None
        self.savers = Savers()
        self._global_batch = global_batch
        self._sequence = sequence
        self._precision = precision
        self._is_compiled = is_compiled
        self._readings = readings
        self._profilers: dict[tuple[int, bool, bool], Profiler] = {}
        self._chains: dict[Group, Chain] = {}
        self._cases: dict[Group, tuple[list[UnitCosts], int]] = {}
        self._links_of_units: dict[tuple[int, int, int, bool], Links] = {}
        self._known: dict[tuple[Choice, int, Savers], Priced | None] = {}
        self._costs_of_stages: dict[tuple[Choice, int, Savers], ChainCosts] = {}
        self._reference = 1 if graph.is_scalable else graph.microbatch
        self.least_factor = (
            1.0 if cluster.calibration is None else min(cluster.calibration.factors.values(), default=1.0)
        )

    @property
    def num_units(self) -> int:
        return len(self.folded.units)

    def profiler(self, tp: int, is_sequence_parallel: bool, has_whole_experts: bool = False) -> Profiler:
        key = (tp, is_sequence_parallel, has_whole_experts)
        if key not in self._profilers:
            self._profilers[key] = (
                self.profiler(tp, is_sequence_parallel).with_whole_experts()
                if has_whole_experts
                else Profiler(
                    self.folded,
                    self.cluster,
                    tp=tp,
                    sequence=self._sequence,
                    is_sequence_parallel=is_sequence_parallel,
                    is_compiled=self._is_compiled,
                    readings=self._readings,
                )
            )
        return self._profilers[key]

    def naming(self, modules: tuple[str, ...], group: Group) -> Pricing:
        """The same where selective recomputation means these modules, for groups that are sharded as this one."""
        named = copy(self)
        key = _sharding_of(group)
        named._profilers = {**self._profilers, key: self.profiler(*key).naming(modules)}
        named._chains, named._cases, named._known, named._costs_of_stages = {}, {}, {}, {}
        return named

    def chain(self, group: Group) -> Chain:
        """The units of a group with their sums."""
        if group not in self._chains:
            profiler = self.profiler(*_sharding_of(group))
            twins = self._twins
            if group in self._cases:
                profile = profiler.of(*self._cases[group], group.microbatch)
            else:
                profile = profiler.at(group.microbatch, self._unit_links(group))
            kinds = [profile.units[twins.index(twin)] for twin in range(max(twins) + 1)]
            self._chains[group] = Chain(profile, kinds, twins, self.folded.layers)
        return self._chains[group]

    def figures(self, groups: Sequence[Group]) -> Figures:
        """What units cost in each group, all at once."""
        numbers: dict[tuple[int, bool, bool], list[int]] = {}
        for number, group in enumerate(groups):
            numbers.setdefault(_sharding_of(group), []).append(number)
        parts = []
        for key, of_part in numbers.items():
            profiler = self.profiler(*key)
            links = [self._unit_links(groups[number]) for number in of_part]
            cases = Cases.of([groups[number].microbatch for number in of_part], links)
            costs = profiler.costs(cases)
            self._cases.update({groups[number]: (costs, case) for case, number in enumerate(of_part)})
            parts.append((of_part, costs, profiler.shared_elements))
        return Figures.of(parts, self._twins)

    @cached_property
    def _twins(self) -> list[int]:
        """The kind of each unit."""
        return [unit.twin for unit in self.folded.units]

    def _unit_links(self, group: Group) -> Links:
        """Who shares sequences and experts, whatever else the mesh is."""
        key = (group.tp, group.cp, group.ep, group.has_whole_experts)
        if key not in self._links_of_units:
            mesh = Mesh(dp=max(1, group.ep // group.cp), cp=group.cp, tp=group.tp)
            self._links_of_units[key] = Links(
                self.cluster,
                mesh,
                ep=group.ep,
                has_whole_experts=group.has_whole_experts,
                costs=self.costs,
            )
        return self._links_of_units[key]

    def price(self, choice: Choice, limit_bytes: int, below_s: float = math.inf) -> Priced | None:
        """The choice at its best cut; None where it does not fit. Raises ``TooSlow`` where it cannot come below ``below_s``.

        What is asked without ``below_s`` is kept: explanations ask for the same choices.
        """
        if below_s != math.inf:
            return self._price(choice, limit_bytes, below_s)
        key = (choice, limit_bytes, self.savers)
        if key not in self._known:
            self._known[key] = self._price(choice, limit_bytes, below_s)
        return self._known[key]

    def _price(self, choice: Choice, limit_bytes: int, below_s: float) -> Priced | None:
        uncut = _Uncut(choice, self.chain(choice.group), self.setup(choice), self.links(choice))
        memory = None
        if choice.schedule.per_rank == 1:
            found = self._cut(uncut, limit_bytes, below_s)
        else:
            found, memory = self._even(uncut, limit_bytes, below_s)
        if found is None:
            return None
        priced = Priced(
            choice=choice,
            setup=found,
            positions=tuple(self.folded.units[start].start for start in found.starts),
            prediction=predict_step(uncut.chain.profile, found, uncut.links, memory),
            savers=self.savers,
        )
        has_room = has_host_room(priced.prediction.host_bytes, self.cluster.device)
        return priced if has_room else None

    def links(self, choice: Choice) -> Links:
        return Links(
            self.cluster,
            choice.mesh,
            num_shards=choice.zero.num_ranks,
            ep=choice.group.ep,
            has_whole_experts=choice.group.has_whole_experts,
            costs=self.costs,
        )

    def setup(self, choice: Choice) -> StepSetup:
        """The choice before its stages are cut."""
        share = -(-self._global_batch // choice.mesh.dp)
        num_stages = choice.mesh.pp * choice.schedule.per_rank
        return StepSetup(
            mesh=choice.mesh,
            starts=tuple(range(num_stages)),
            microbatch=choice.group.microbatch,
            num_microbatches=-(-share // choice.group.microbatch),
            global_batch=self._global_batch,
            sequence=self._sequence,
            zero=choice.zero.level,
            recompute="none",
            schedule=choice.schedule.name,
            precision=self._precision,
            bucket_bytes=Plan.bucket_bytes,
            ep=choice.group.ep,
            has_whole_experts=choice.group.has_whole_experts,
            zero_ranks=choice.zero.num_ranks,
            gradient_dtype=self.savers.gradient_dtype,
            is_offloaded=self.savers.offload == "optimizer",
            layers=self.folded.layers,
        )

    def _cut(self, uncut: _Uncut, limit_bytes: int, below_s: float) -> StepSetup | None:
        """Stages and what they recompute, solved exactly: first for the pipeline alone, which is nearly all of most steps."""
        choice, chain, setup, _ = uncut
        costs = self._stage_costs(uncut, limit_bytes)
        counts_sum = setup.schedule in ("1f1b", "gpipe")
        room_s = self._room_s(uncut, below_s)
        if not _may_come_below(room_s, costs, setup, counts_sum=counts_sum):
            raise TooSlow(choice)
        cut = best_cut(costs, setup.mesh.pp, setup.num_microbatches, below_s=room_s, counts_sum=counts_sum)
        if cut is None:
            return None
        if counts_sum or not self._cuts_for_step:
            times = _stage_times(chain, cut.starts, cut.recompute, self._summing_s(setup))
            if self._least_s(setup, times) >= below_s:
                raise TooSlow(choice)
        return self._quickest(uncut, costs, cut, below_s)

    @property
    def _cuts_for_step(self) -> bool:
        """Not by factors of a calibration; nor where ranks share cores, on which it hardly matters who computes what: the simulator finds
        such cuts to be no quicker."""
        return self.cluster.calibration is None and self.cluster.device.alone_ratio == 1

    def _quickest(self, uncut: _Uncut, costs: ChainCosts, cut: Cut, below_s: float) -> StepSetup:
        """The setup with the cut, or with one whose whole step is quicker."""
        choice, chain, setup, links = uncut
        found = setup.with_stages(cut.starts, cut.recompute)
        if setup.mesh.pp == 1 or not self._cuts_for_step:
            _check_seconds(uncut, found, below_s)
            return found
        seconds = step_seconds(chain.profile, found, links)
        least_bubble_s, most_weight_s = self._least_bubble_s(chain, setup)
        other = quicker_cut(
            costs,
            RunCosts(chain, setup, links, costs),
            StepBound.of(chain, setup, links, bubble_s=least_bubble_s, weight_s=most_weight_s),
            pipeline_s=least_pipeline_s(cut, setup),
            below_s=min(seconds, below_s),
            seconds_of=lambda *stages: step_seconds(chain.profile, setup.with_stages(*stages), links),
        )
        if other is not None:
            return setup.with_stages(*other)
        if seconds >= below_s:
            raise TooSlow(choice, seconds)
        return found

    def _stage_costs(self, uncut: _Uncut, limit_bytes: int) -> ChainCosts:
        """Of the choice's stages; kept where no link has a say in it, as the same mesh in another order asks for the same."""
        choice, chain, setup, links = uncut
        element_s = self._element_s(setup)
        if setup.sharding_level >= 2:
            waits = ShardingWaits(chain, setup, links)
            return ChainCosts(chain, setup, limit_bytes, element_s / setup.num_shards, waits, self._asked)
        key = (replace(choice, mesh=replace(choice.mesh, order=AXES)), limit_bytes, self.savers)
        if key not in self._costs_of_stages:
            self._costs_of_stages[key] = ChainCosts(chain, setup, limit_bytes, element_s, asked=self._asked)
        return self._costs_of_stages[key]

    def _room_s(self, uncut: _Uncut, below_s: float) -> float:
        """Seconds that the pipeline may take, as ranks that share cores compute, where a step is to take less than ``below_s``."""
        _, chain, setup, links = uncut
        ratio, m = self.cluster.device.alone_ratio, setup.num_microbatches
        room_s = ratio * (below_s / self.least_factor - self._beside_s(chain, setup, links))
        if below_s == math.inf or setup.sharding_level >= 2 or setup.mesh.num_replicas == 1:
            return room_s
        most_s, exposed = room_s / m, math.inf
        stops = range(1, chain.num_units - setup.mesh.pp + 2) if setup.mesh.pp > 1 else (chain.num_units,)
        for stop in stops:  # the first stage ends here: nothing hides its gradients' sum but its own backward
            if chain.both_s[stop] > most_s:
                break
            backward_s = most_s - chain.forward_s[stop]
            exposed = min(
                exposed,
                least_reduction_s(int(chain.own[stop]), int(chain.experts[stop]), backward_s, setup, links),
            )
        return room_s - ratio * exposed

    def _beside_s(self, chain: Chain, setup: StepSetup, links: Links) -> float:
        """What a step takes at least beside what ``best_cut`` counts: transfers, the optimizer, the norm's sum, and the least bubble
        where schedules cut backwards."""
        least_bubble_s, _ = self._least_bubble_s(chain, setup)
        return least_beside_s(chain, setup, links) + least_bubble_s / self.cluster.device.alone_ratio

    def _least_bubble_s(self, chain: Chain, setup: StepSetup) -> tuple[float, float]:
        """Of a schedule that splits backwards, on ranks alone, and what can be put off at most; 0 of others."""
        if setup.schedule not in SPLITTING:
            return 0.0, 0.0
        p = setup.mesh.pp
        (whole,) = _stage_times(chain, (0,), ("none",), self._summing_s(setup))
        mean = StageTime(*(seconds / p for seconds in whole))
        return bubble_s(setup.schedule, [mean] * p, p, setup.num_microbatches), whole.weight_s

    def _element_s(self, setup: StepSetup) -> float:
        """Seconds of adding an element's gradient to its sum; a single microbatch has none."""
        is_summed = setup.num_microbatches > 1
        return moved_s(setup.accumulation_bytes, self.cluster.device) if is_summed else 0.0

    def _summing_s(self, setup: StepSetup) -> tuple[float, float]:
        """The same of any element that a rank holds, at least and at most: under ZeRO-2/3 it adds up those that it owns."""
        whole_s = self._element_s(setup)
        if setup.sharding_level < 2:
            return whole_s, whole_s
        return 0.0, whole_s / min(setup.num_shards, setup.expert_shards)

    def _even(
        self, uncut: _Uncut, limit_bytes: int, below_s: float
    ) -> tuple[StepSetup | None, MemoryModel | None]:
        """Several stages a rank: cut for balance, all recomputing as many layers, as few as fit; and what the ranks hold."""
        setup = replace(uncut.setup, starts=self.even.starts(uncut.setup.num_stages))
        alike = Alike(uncut.chain.profile, uncut.chain.layers, setup, limit_bytes)
        recompute: StageRecompute | None = self._asked or "none"
        while recompute is not None:
            made = alike.setup(recompute)
            modes, summing_s = (recompute,) * made.num_stages, self._summing_s(setup)
            times = _stage_times(uncut.chain, made.starts, modes, summing_s)
            if self._least_s(made, times) >= below_s:
                raise TooSlow(uncut.choice)
            _check_seconds(uncut, made, below_s)
            memory = alike.within(recompute)
            if memory is not None:
                return made, memory
            recompute = alike.least() if self._asked is None else None
        return None, None

    def _least_s(self, setup: StepSetup, times: list[StageTime]) -> float:
        """What the pipeline alone takes at least, before ZeRO's waits and transfers."""
        m, p, ratio = setup.num_microbatches, setup.mesh.pp, self.cluster.device.alone_ratio
        seconds = pipeline_s(setup.schedule, times, p, m)
        if ratio > 1:
            seconds = max(seconds / ratio, m * sum(time.both_s for time in times) / p)
        return self.least_factor * seconds

    @cached_property
    def even(self) -> EvenCuts:
        """Stages of equal seconds, for all choices alike: of what the units take one rank for one sample."""
        units = self.profiler(1, False).at(self._reference).units
        seconds = [unit.forward_s + unit.backward_s for unit in units]
        return EvenCuts(self._twins, self.folded.layers, seconds)


def _sharding_of(group: Group) -> tuple[int, bool, bool]:
    return group.tp, group.is_sequence_parallel, group.has_whole_experts


class _Uncut(NamedTuple):
    """A choice whose stages are not cut yet, with what its price is made of."""

    choice: Choice
    chain: Chain
    setup: StepSetup
    links: Links


def _check_seconds(uncut: _Uncut, setup: StepSetup, below_s: float) -> None:
    """Raises ``TooSlow`` where a step of the cut setup takes ``below_s`` or more; that is known sooner than what its ranks hold."""
    if below_s == math.inf:
        return
    seconds = step_seconds(uncut.chain.profile, setup, uncut.links)
    if seconds >= below_s:
        raise TooSlow(uncut.choice, seconds)


class TooSlow(Exception):
    """A choice whose price cannot come below the best one's: its seconds, where they were found out, if it fits."""

    def __init__(self, choice: Choice, seconds: float = math.inf) -> None:
        super().__init__(choice)
        self.choice = choice
        self.seconds = seconds


def _may_come_below(room_s: float, costs: ChainCosts, setup: StepSetup, *, counts_sum: bool) -> bool:
    """Whether a cut may take less if memory were no matter: by the mean stage, the heaviest unit, and as many units a stage as fit."""
    p, m = setup.mesh.pp, setup.num_microbatches
    total_s, slowest_s = costs.least_total_s, costs.least_slowest_s(p)
    if counts_sum:
        most_s = (room_s - total_s) / (m - 1) if m > 1 else math.inf
        return (m - 1) * slowest_s + total_s < room_s and costs.has_cut(p, most_s)
    return m * slowest_s < room_s and costs.has_cut(p, room_s / m)


def _stage_times(
    chain: Chain,
    starts: tuple[int, ...],
    modes: tuple[StageRecompute, ...],
    summing_s: tuple[float, float],
) -> list[StageTime]:
    """Least seconds of stages, without what ZeRO waits for; at most what can be put off."""
    stops, layers, (least_s, most_s) = (*starts[1:], chain.num_units), chain.layers, summing_s
    forward, backward, weight = chain.forward_s, chain.backward_s, chain.weight_s
    return [
        StageTime(
            forward_s=forward[stop] - forward[start],
            backward_s=backward[stop]
            - backward[start]
            + layers.again_s(layers.runs(mode, start, stop))
            + least_s * (chain.own[stop] - chain.own[start]),
            weight_s=weight[stop] - weight[start] + most_s * (chain.summed[stop] - chain.summed[start]),
        )
        for start, stop, mode in zip(starts, stops, modes, strict=True)
    ]


def fold_for(graph: ModelGraph, num_ranks: int, modules: tuple[str, ...]) -> Folded:
    """Units are blocks, the unit of ZeRO's gathers, too; finer where there are too few of them to make stages of."""
    folded = fold(graph, modules=modules)
    if len(folded.units) >= min(num_ranks, ENOUGH_UNITS):
        return folded
    return fold(graph, boundaries=good_positions(graph), modules=modules)


def is_in_parts(folded: Folded, graph: ModelGraph) -> bool:
    """Whether ``fold_for`` made units of parts of the graph's blocks."""
    return len(folded.units) > len(graph.blocks)
