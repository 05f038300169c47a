"""``MixedPricing``: what a choice costs exactly, at the best cut that its pipelines have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from copy import copy
from dataclasses import replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from shardstage.cluster import Cluster
from shardstage.cost import MemoryModel, StepSetup, step_seconds
from shardstage.cost.compute import moved_s
from shardstage.cost.offload import has_host_room
from shardstage.cost.pipeline import SPLITTING, StageTime, pipeline_s
from shardstage.cost.readings import Readings
from shardstage.graph import ModelGraph
from shardstage.graph.recompute import StageRecompute
from shardstage.plan import Plan, Precision
from shardstage.plan.complete import ranges
from shardstage.planner.alike import Alike
from shardstage.planner.chain import Chain, state_bytes_of
from shardstage.planner.mixed.balance import balanced_on
from shardstage.planner.mixed.cuts import LaneAsStages, LanesAsStages
from shardstage.planner.mixed.even import EvenCut, EvenLane, Sums
from shardstage.planner.mixed.given import OnClasses
from shardstage.planner.mixed.lanes import LaneCosts, classes_of_stages, combined
from shardstage.planner.mixed.priced import MixedPriced, TooLong
from shardstage.planner.mixed.space import Lane, MixedChoice, Sharding
from shardstage.planner.pricing import fold_for
from shardstage.planner.recut import least_beside_s, least_pipeline_s, quicker_cut
from shardstage.planner.space import Savers
from shardstage.planner.stages import StageCosts, best_cut

__all__ = ["MixedPricing"]


class MixedPricing:
    """Prices choices for one graph, cluster and batch; a class may hold ``limits`` bytes a rank."""

    def __init__(
        self,
        graph: ModelGraph,
        cluster: Cluster,
        *,
        global_batch: int,
        sequence: int | None,
        precision: Precision,
        is_compiled: bool = False,
        asked: StageRecompute | None = None,
        modules: tuple[str, ...] = (),
        readings: Readings | None = None,
    ) -> None:
        self.graph = graph
        self.cluster = cluster
        self.global_batch = global_batch
        self.sequence = sequence
        self.precision: Precision = precision
        self.is_compiled = is_compiled
        self.asked = asked
        self.modules = modules
        self.savers = Savers()
        self.folded = fold_for(graph, cluster.num_devices, modules)
        self.costs = LaneCosts(
            cluster, self.folded, sequence=sequence, is_compiled=is_compiled, readings=readings
        )
        calibrations = (part.calibration for part in self.costs.classes)
        factors = [f for each in calibrations if each is not None for f in each.factors.values()]
        shares_cores = any(part.device.alone_ratio > 1 for part in self.costs.classes)
        self._cuts_for_step = not factors and not shares_cores
        self.least_factor = min([1.0, *factors])
        self.least_ratio = self.least_factor / max(part.device.alone_ratio for part in self.costs.classes)
        self._twins = [unit.twin for unit in self.folded.units]
        self._forget()

    def _forget(self) -> None:
        """Nothing was asked so far."""
        self._chains: dict[tuple[Sharding, int, int], Chain] = {}
        self._pipelines: dict[tuple[object, ...], float] = {}
        self._sums: dict[tuple[Sharding, int, int], Sums] = {}
        self._even_cuts: dict[tuple[object, ...], EvenCut] = {}
        self._lanes: dict[tuple[object, ...], EvenLane] = {}
        self._ends: dict[tuple[object, ...], Alike] = {}
        self._beside: dict[tuple[object, ...], float] = {}
        self._starts: dict[tuple[object, ...], tuple[int, ...]] = {}
        self._known: dict[tuple[object, ...], MixedPriced | None] = {}

    @property
    def num_units(self) -> int:
        return len(self.folded.units)

    @property
    def num_of_kinds(self) -> npt.NDArray[np.float64]:
        """[kind]: how many units there are of each."""
        found: npt.NDArray[np.float64] = np.bincount(self._twins).astype(np.float64)
        return found

    @property
    def twins(self) -> list[int]:
        return self._twins

    def asking(self, recompute: StageRecompute) -> MixedPricing:
        """The same where all stages recompute so."""
        asked = copy(self)
        asked.asked, asked._known = recompute, {}
        return asked

    def naming(self, modules: tuple[str, ...], of: Sharding) -> MixedPricing:
        """The same where selective recomputation means these modules, for choices of this sharding."""
        named = copy(self)
        named.costs, named.modules = self.costs.naming(modules, of), modules
        named._forget()
        return named

    def price(
        self,
        choice: MixedChoice,
        limits: Sequence[int],
        below_s: float = math.inf,
        firsts: tuple[int, ...] = (),
    ) -> MixedPriced | None:
        """The choice at its best cut; None where it does not fit. Raises ``TooLong`` where it cannot come below ``below_s``.

        ``firsts`` are units at which each class begins, where these are given; a rank has one stage then. What is asked without
        ``below_s`` is kept: explanations ask for the same choices.
        """
        if below_s != math.inf:
            return self._price(choice, limits, below_s, firsts)
        key = (choice, tuple(limits), firsts, self.savers)
        if key not in self._known:
            self._known[key] = self._price(choice, limits, below_s, firsts)
        return self._known[key]

    def _price(
        self, choice: MixedChoice, limits: Sequence[int], below_s: float, firsts: tuple[int, ...]
    ) -> MixedPriced | None:
        setup = self.setup(choice)
        if choice.schedule.per_rank == 1:
            found = self._cut(choice, setup, limits, below_s, firsts)
        else:
            found = self._even(choice, setup, limits, below_s)
        if found is None:
            return None
        lanes, is_sp = choice.arrangement.lanes, choice.arrangement.sharding.is_sequence_parallel
        predictions = [self.costs.predict(lane, found, is_sp) for lane in lanes]
        peaks = [0] * len(limits)
        for lane, prediction in zip(lanes, predictions, strict=True):
            for pp, number in enumerate(lane.classes):
                peaks[number] = max(peaks[number], prediction.rank_peak_bytes(pp))
        has_room = all(
            has_host_room(prediction.host_bytes, self.costs.classes[number].device)
            for lane, prediction in zip(lanes, predictions, strict=True)
            for number in {*lane.classes}
        )
        if not has_room or any(peak > limit for peak, limit in zip(peaks, limits, strict=True)):
            return None
        plan = self._plan(choice, found)
        used = self.cluster.with_parts(choice.arrangement.used)
        return MixedPriced(
            choice=choice,
            setup=found,
            plan=plan,
            prediction=combined(predictions, plan, used),
            peaks=tuple(peaks),
        )

    def setup(self, choice: MixedChoice) -> StepSetup:
        """The choice before its stages are cut."""
        of = choice.arrangement
        return StepSetup(
            mesh=of.mesh,
            starts=tuple(range(of.pp * choice.schedule.per_rank)),
            microbatch=max(of.sizes),
            num_microbatches=of.num_microbatches,
            global_batch=self.global_batch,
            sequence=self.sequence,
            zero=choice.zero.level,
            zero_ranks=choice.zero.num_ranks,
            ep=of.sharding.ep,
            has_whole_experts=of.sharding.has_whole_experts,
            recompute=self.asked or "none",
            schedule=choice.schedule.name,
            precision=self.precision,
            bucket_bytes=Plan.bucket_bytes,
            gradient_dtype=self.savers.gradient_dtype,
            is_offloaded=self.savers.offload == "optimizer",
            layers=self.folded.layers,
        )

    def chain(self, choice: MixedChoice, number: int, size: int) -> Chain:
        """The units on one class, with their sums."""
        key = (choice.arrangement.sharding, number, size)
        if key not in self._chains:
            profile, twins = self.costs.profile(*key), self._twins
            kinds = [profile.units[twins.index(twin)] for twin in range(max(twins) + 1)]
            self._chains[key] = Chain(profile, kinds, twins, self.folded.layers)
        return self._chains[key]

    def _chains_of(self, choice: MixedChoice, lane: Lane) -> list[Chain | None]:
        own = {*lane.classes}
        return [
            self.chain(choice, number, lane.size) if number in own else None
            for number in range(len(self.costs.classes))
        ]

    def _cut(
        self,
        choice: MixedChoice,
        setup: StepSetup,
        limits: Sequence[int],
        below_s: float,
        firsts: tuple[int, ...],
    ) -> StepSetup | None:
        """Stages and what they recompute: exact for one lane, and for its whole step; for several by the slowest at each stage."""
        lanes = choice.arrangement.lanes
        of_lanes = [self.stages_of(choice, lane, setup, limits) for lane in lanes]
        stages = of_lanes[0] if len(lanes) == 1 else LanesAsStages(of_lanes)
        on_classes = OnClasses(stages, lanes[0].classes, firsts) if firsts else stages
        cut = best_cut(
            on_classes,
            setup.mesh.pp,
            setup.num_microbatches,
            below_s=max(self._pipeline_below_s(choice, lane, setup, below_s) for lane in lanes)
            + _apart_s(stages, of_lanes, setup.mesh.pp),
            counts_sum=setup.schedule in ("1f1b", "gpipe"),
        )
        if cut is None:
            return None
        found = setup.with_stages(cut.starts, cut.recompute)
        if len(lanes) > 1 or setup.mesh.pp == 1 or not self._cuts_for_step:
            self._check_seconds(choice, lanes, found, below_s)
            return found
        seconds = self.step_s(choice, lanes, found)
        other = quicker_cut(
            on_classes,
            of_lanes[0].run,
            of_lanes[0].bound(),
            pipeline_s=least_pipeline_s(cut, setup),
            below_s=min(seconds, below_s),
            seconds_of=lambda *of: self.step_s(choice, lanes, setup.with_stages(*of)),
        )
        if other is None and seconds >= below_s:
            raise TooLong(seconds)
        return found if other is None else setup.with_stages(*other)

    def stages_of(
        self, choice: MixedChoice, lane: Lane, setup: StepSetup, limits: Sequence[int]
    ) -> LaneAsStages:
        """A lane's units as stages."""
        links = self.costs.links(lane, setup)
        return LaneAsStages(lane, self._chains_of(choice, lane), setup, links, limits, self.asked)

    def _pipeline_below_s(self, choice: MixedChoice, lane: Lane, setup: StepSetup, below_s: float) -> float:
        """What a lane's pipeline may take where the step takes ``below_s``: transfers, the optimizer and the norm's sum come on top."""
        if below_s == math.inf:
            return below_s
        key = (choice.arrangement, choice.zero, lane, self.savers)
        if key not in self._beside:
            self._beside[key] = self._beside_s(choice, lane, setup)
        ratio = self.costs.reference(lane.classes).device.alone_ratio
        return ratio * (below_s / self.least_factor - self._beside[key])

    def _beside_s(self, choice: MixedChoice, lane: Lane, setup: StepSetup) -> float:
        """What a step takes at least beside the pipeline."""
        links, chain = self.costs.links(lane, setup), self.chain(choice, lane.classes[0], lane.size)
        return least_beside_s(chain, setup, links)

    def _check_seconds(
        self, choice: MixedChoice, lanes: Sequence[Lane], setup: StepSetup, below_s: float
    ) -> None:
        """Raises ``TooLong`` where a step takes ``below_s`` or more; that is known sooner than what its ranks hold."""
        if below_s == math.inf:
            return
        seconds = self.step_s(choice, lanes, setup)
        if seconds >= below_s:
            raise TooLong(seconds)

    def step_s(self, choice: MixedChoice, lanes: Sequence[Lane], setup: StepSetup) -> float:
        """Seconds of a step as the slowest of some lanes has it."""
        is_sp = choice.arrangement.sharding.is_sequence_parallel
        return max(
            step_seconds(
                self.costs.lane_profile(lane, setup, is_sp),
                replace(setup, microbatch=lane.size),
                self.costs.links(lane, setup),
            )
            for lane in lanes
        )

    def _even(
        self, choice: MixedChoice, setup: StepSetup, limits: Sequence[int], below_s: float
    ) -> StepSetup | None:
        """Several stages a rank: cut for balance on the slowest lane, all recomputing as many layers, as few as fit into all lanes."""
        lanes, is_sp = choice.arrangement.lanes, choice.arrangement.sharding.is_sequence_parallel
        made = replace(setup, starts=self._balanced(choice, setup))
        for lane in lanes:
            if not self._may_fit(choice, lane, replace(made, microbatch=lane.size), limits, below_s):
                return None
        needs = [
            self._least(choice, lane, replace(made, microbatch=lane.size), limits, below_s) for lane in lanes
        ]
        for mode in dict.fromkeys(needs):
            if mode is None:
                return None
            found = replace(made, recompute=mode)
            others = [lane for lane, need in zip(lanes, needs, strict=True) if need != mode]
            if all(_holds(self.costs, lane, found, is_sp, limits) for lane in others):
                self._check_seconds(choice, lanes, found, below_s)
                return found
        return None

    def _least(
        self, choice: MixedChoice, lane: Lane, setup: StepSetup, limits: Sequence[int], below_s: float
    ) -> StageRecompute | None:
        """The least recomputation that lets all ranks of a lane fit."""
        if self.asked is None:
            options = self._options(choice, lane, setup, limits, below_s)
            if not options:
                return None
            recompute = options[0]
        else:
            recompute = self.asked
        alike = self._alike(choice, lane, setup, limits)
        while alike.within(recompute) is None:
            options = alike.options() if self.asked is None else []
            if not options:
                return None
            self._check_options(choice, lane, setup, options, below_s)
            recompute = options[0]
        return recompute

    def _options(
        self, choice: MixedChoice, lane: Lane, setup: StepSetup, limits: Sequence[int], below_s: float
    ) -> list[StageRecompute]:
        """What a lane may recompute at least, by what the first ranks of its classes and its last rank hold. Raises ``TooLong``
        where none of that comes below ``below_s``."""
        key = (choice.arrangement, choice.schedule, lane, tuple(limits))
        if key not in self._ends:
            self._ends[key] = self._alike(choice, lane, setup, limits)
        alike, chain = self._ends[key], self.chain(choice, lane.classes[0], lane.size)
        of_stage = state_bytes_of(chain, setup)
        for rank in {*map(lane.classes.index, lane.classes), setup.mesh.pp - 1}:
            alike.assume(rank, of_stage)
        options = alike.options()
        if options:
            self._check_options(choice, lane, setup, options, below_s)
        return options

    def _check_options(
        self,
        choice: MixedChoice,
        lane: Lane,
        setup: StepSetup,
        options: Sequence[StageRecompute],
        below_s: float,
    ) -> None:
        """Raises ``TooLong`` where no way of recomputation lets a lane come below ``below_s``."""
        for recompute in options:
            with suppress(TooLong):
                found = replace(setup, recompute=recompute)
                self._check_pipeline(choice, lane, found, below_s)
                self._check_seconds(choice, [lane], found, below_s)
                return
        raise TooLong

    def _may_fit(
        self, choice: MixedChoice, lane: Lane, setup: StepSetup, limits: Sequence[int], below_s: float
    ) -> bool:
        """Whether some ranks of a lane may fit. Raises ``TooLong`` where what all must then recompute takes too long."""
        if below_s == math.inf:
            return True
        if self.asked is not None:
            self._check_pipeline(choice, lane, setup, below_s)
            return True
        key = (choice.arrangement, choice.schedule, lane)
        if key not in self._lanes:
            self._lanes[key] = self._even_lane(choice, lane, setup)
        most_s, of_lane = self._pipeline_below_s(choice, lane, setup, below_s), self._lanes[key]
        if of_lane.plain_s >= most_s:
            raise TooLong
        least_s = of_lane.least_s(setup, limits)
        if most_s <= least_s < math.inf:
            raise TooLong
        return least_s < math.inf

    def _even_lane(self, choice: MixedChoice, lane: Lane, setup: StepSetup) -> EvenLane:
        of = choice.arrangement
        sums = {}
        for number in {*lane.classes}:
            key = (of.sharding, number, lane.size)
            if key not in self._sums:
                self._sums[key] = Sums(self.chain(choice, number, lane.size))
            sums[number] = self._sums[key]
        is_v = setup.schedule in SPLITTING
        if (setup.starts, lane.classes, is_v) not in self._even_cuts:
            chain = sums[lane.classes[0]].chain
            self._even_cuts[setup.starts, lane.classes, is_v] = EvenCut(chain, lane.classes, setup)
        cut = self._even_cuts[setup.starts, lane.classes, is_v]
        return EvenLane(sums, cut, setup, self._most_summing_s(lane, setup))

    def _most_summing_s(self, lane: Lane, setup: StepSetup) -> float:
        """Seconds of adding an element's gradient to its sum, as without ZeRO."""
        if setup.num_microbatches == 1:
            return 0.0
        return moved_s(setup.accumulation_bytes, self.costs.reference(lane.classes).device)

    def _alike(self, choice: MixedChoice, lane: Lane, setup: StepSetup, limits: Sequence[int]) -> Alike:
        profile = self.costs.lane_profile(lane, setup, choice.arrangement.sharding.is_sequence_parallel)
        layers = self.chain(choice, lane.classes[0], lane.size).layers
        return Alike(profile, layers, setup, [limits[number] for number in lane.classes])

    def _balanced(self, choice: MixedChoice, setup: StepSetup) -> tuple[int, ...]:
        """Stages of ranks of nearly equal seconds, of what the units take the first lane's classes for about as many samples."""
        of, lane, p = choice.arrangement, choice.arrangement.lanes[0], setup.mesh.pp
        size = 1 << (lane.size.bit_length() - 1)
        key = (of.sharding, size, lane.classes, setup.schedule in SPLITTING, setup.num_stages)
        if key not in self._starts:
            ranks = [0] * setup.num_stages
            for rank in range(p):
                for stage in setup.stages_of(rank):
                    ranks[stage] = rank
            sums = {number: self.chain(choice, number, size).both_s for number in {*lane.classes}}
            self._starts[key] = balanced_on([sums[lane.classes[rank]] for rank in ranks], ranks)
        return self._starts[key]

    def _check_pipeline(self, choice: MixedChoice, lane: Lane, setup: StepSetup, below_s: float) -> None:
        """Raises ``TooLong`` where a lane's pipeline alone takes ``below_s``, before ZeRO's waits and sums of gradients."""
        if below_s == math.inf:
            return
        key = (choice.arrangement, choice.schedule, lane, setup.recompute)
        if key not in self._pipelines:
            self._pipelines[key] = self._pipeline_s(choice, lane, setup)
        if self._pipelines[key] >= self._pipeline_below_s(choice, lane, setup, below_s):
            raise TooLong

    def _pipeline_s(self, choice: MixedChoice, lane: Lane, setup: StepSetup) -> float:
        """Of a lane's stages as ZeRO would have them that neither waits nor sums: the same for all its levels."""
        mode, times, summing_s = setup.recompute, [], self._most_summing_s(lane, setup)
        chains = {number: self.chain(choice, number, lane.size) for number in {*lane.classes}}
        spans = pairwise((*setup.starts, self.num_units))
        for number, (start, stop) in zip(classes_of_stages(lane, setup), spans, strict=True):
            of = chains[number]
            forward_s = of.forward_s[stop] - of.forward_s[start]
            backward_s = of.backward_s[stop] - of.backward_s[start]
            if mode != "none":
                backward_s += of.layers.again_s(of.layers.runs(mode, start, stop))
            weight_s = of.weight_s[stop] - of.weight_s[start]
            weight_s += summing_s * (of.summed[stop] - of.summed[start])
            times.append(StageTime(forward_s, backward_s, weight_s=weight_s))
        return pipeline_s(setup.schedule, times, setup.mesh.pp, setup.num_microbatches)

    def _plan(self, choice: MixedChoice, setup: StepSetup) -> Plan:
        of = choice.arrangement
        plan = Plan(
            mesh=setup.mesh,
            stages=ranges(self.graph, [self.folded.units[start].start for start in setup.starts]),
            global_batch=self.global_batch,
            sequence=self.sequence,
            microbatch=max(of.sizes),
            shares=of.shares(self.global_batch),
            zero=choice.zero.level,
            zero_ranks=choice.zero.num_ranks,
            recompute=setup.recompute,
            stage_recompute=setup.recompute_of_stages,
            schedule=choice.schedule.name,
            precision=self.precision,
            is_sequence_parallel=of.sharding.is_sequence_parallel,
            ep=of.sharding.ep,
            etp=1 if of.sharding.has_whole_experts else None,
            is_compiled=self.is_compiled,
            gradient_dtype=self.savers.gradient_dtype,
            offload=self.savers.offload,
        )
        return replace(plan, recompute_modules=self.modules) if plan.is_selective else plan


def _apart_s(stages: StageCosts, of_lanes: Sequence[StageCosts], num_stages: int) -> float:
    """How much longer all stages at their slowest take than those of the quickest lane: so much may a cut of all exceed a lane's time."""
    ends = {0, num_stages - 1}
    least_s = min(lane.plain_s(stage, 0, lane.num_units) for lane in of_lanes for stage in ends)
    return max(0.0, min(stages.plain_s(stage, 0, stages.num_units) for stage in ends) - least_s)


def _holds(costs: LaneCosts, lane: Lane, setup: StepSetup, is_sp: bool, limits: Sequence[int]) -> bool:
    memory = MemoryModel(costs.lane_profile(lane, setup, is_sp), replace(setup, microbatch=lane.size))
    return all(memory.rank(rank).total_bytes <= limits[number] for rank, number in enumerate(lane.classes))
