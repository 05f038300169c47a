"""``Pricer``: what pipelines take and hold on a cluster of several device classes; ``predict_mixed`` prices any plan by it.

Each stage's units cost what they do on its own class, collectives what they do over the joint levels. What is not a unit's (the optimizer,
sums of gradients) is priced on the pipeline's class of slowest memory. Pipelines that lie on the same classes and run as large
microbatches are alike (a *lane*); the slowest one sets the time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from shardstage.cluster import Cluster
from shardstage.cost import (
    Folded,
    Links,
    MemoryModel,
    Prediction,
    Profile,
    Profiler,
    StepSetup,
    fold,
    predict_step,
)
from shardstage.cost.links import LinkCosts
from shardstage.cost.memory import MemoryUse
from shardstage.cost.readings import Readings
from shardstage.errors import PlanError
from shardstage.graph import ModelGraph
from shardstage.plan import Plan
from shardstage.plan.order import setup_of
from shardstage.plan.schedule import schedule_of
from shardstage.planner.mixed.space import Lane

__all__ = ["LaneCosts", "class_peaks", "combined", "lanes_of", "predict_mixed"]


def predict_mixed(graph: ModelGraph, plan: Plan, cluster: Cluster) -> Prediction:
    """What a plan takes on a cluster of several classes: its slowest pipeline, and the most that any of them holds.

    Raises ``PlanError`` where a tensor-parallel group lies on two classes.
    """
    return combined([found for _, found in _predictions(graph, plan, cluster)], plan, cluster)


def class_peaks(graph: ModelGraph, plan: Plan, cluster: Cluster) -> tuple[int, ...]:
    """Bytes at the peak of the fullest rank of each class; 0 where none computes."""
    peaks = [0] * len(cluster.parts)
    for lane, prediction in _predictions(graph, plan, cluster):
        for pp, number in enumerate(lane.classes):
            peaks[number] = max(peaks[number], prediction.rank_peak_bytes(pp))
    return tuple(peaks)


def combined(found: Sequence[Prediction], plan: Plan, cluster: Cluster) -> Prediction:
    """Of a plan's lanes; MFU counts all devices of the cluster."""
    slowest = max(found, key=lambda prediction: prediction.step_time_s)
    ranks = tuple(max(uses, key=_total_bytes) for uses in zip(*(each.ranks for each in found), strict=True))
    rates = [part.num_devices * part.device.rate(plan.precision) for part in cluster.parts]
    return replace(slowest, ranks=ranks, mfu=slowest.mfu / sum(rates))


def _total_bytes(use: MemoryUse) -> int:
    return use.total_bytes


def _predictions(graph: ModelGraph, plan: Plan, cluster: Cluster) -> list[tuple[Lane, Prediction]]:
    positions = {op.name: index for index, op in enumerate(graph.ops)}
    boundaries = tuple(positions[stage.first] for stage in plan.stages)
    folded = fold(graph, boundaries=boundaries, modules=plan.recompute_modules)
    custom = schedule_of(plan) if plan.schedule == "custom" else None
    setup = setup_of(plan, folded, tuple(folded.unit_at(position) for position in boundaries), custom)
    costs = LaneCosts(
        cluster, folded, sequence=plan.sequence, replicate=plan.replicate, is_compiled=plan.is_compiled
    )
    return [(lane, costs.predict(lane, setup, plan.is_sequence_parallel)) for lane in lanes_of(plan, cluster)]


def lanes_of(plan: Plan, cluster: Cluster) -> tuple[Lane, ...]:
    """The different pipelines of a plan."""
    return tuple(
        dict.fromkeys(
            Lane(_classes_of(plan, dp, cluster), max(plan.microbatches(dp))) for dp in range(plan.mesh.dp)
        )
    )


def _classes_of(plan: Plan, dp: int, cluster: Cluster) -> tuple[int, ...]:
    """The class of each pipeline rank of a data-parallel rank."""
    mesh, found = plan.mesh, []
    for pp in range(mesh.pp):
        ranks = [mesh.rank(pp=pp, dp=dp, tp=tp) for tp in range(mesh.tp)]
        numbers = {cluster.part_of(rank) for rank in (ranks[0], ranks[-1])}
        if len(numbers) > 1:
            raise PlanError(
                f"tensor-parallel ranks {ranks} lie on different devices, and the slower ones would hold the others up at every layer",
                hint=f'--plan "tp={math.gcd(*(part.num_devices for part in cluster.parts))}"',
            )
        found.append(numbers.pop())
    return tuple(found)


class LaneCosts:
    """Units of one model on each class of a cluster, and links over all of it; what was asked once is kept."""

    def __init__(
        self,
        cluster: Cluster,
        folded: Folded,
        *,
        sequence: int | None,
        replicate: Sequence[str] = (),
        is_compiled: bool = False,
        readings: Readings | None = None,
    ) -> None:
        self.folded = folded
        self.classes = tuple(
            replace(part, levels=cluster.levels, collectives=(), num_devices=cluster.num_devices)
            for part in map(cluster.part, range(len(cluster.parts)))
        )
        self.link_costs = LinkCosts(self.classes[0])
        self._shard: Callable[[int, bool], Profiler] = lambda tp, is_sp: Profiler(
            folded,
            self.classes[0],
            tp=tp,
            sequence=sequence,
            is_sequence_parallel=is_sp,
            replicate=replicate,
            is_compiled=is_compiled,
            readings=readings,
        )
        self._profilers: dict[tuple[int, bool, int], Profiler] = {}
        self._profiles: dict[tuple[int, bool, int, int], Profile] = {}

    def profiler(self, tp: int, is_sp: bool, number: int) -> Profiler:
        """Of one class: the model is sharded once for all of them."""
        key = (tp, is_sp, number)
        if key not in self._profilers:
            first = self._shard(tp, is_sp) if number == 0 else self.profiler(tp, is_sp, 0)
            self._profilers[key] = first.on(self.classes[number]) if number else first
        return self._profilers[key]

    def profile(self, tp: int, is_sp: bool, number: int, size: int) -> Profile:
        """The units on one class for a microbatch of so many samples."""
        key = (tp, is_sp, number, size)
        if key not in self._profiles:
            self._profiles[key] = self.profiler(tp, is_sp, number).at(size)
        return self._profiles[key]

    def reference(self, classes: Iterable[int]) -> Cluster:
        """Of some classes the one of slowest memory."""
        return min((self.classes[i] for i in classes), key=lambda each: each.device.bytes_per_s)

    def links(self, lane: Lane, setup: StepSetup) -> Links:
        return Links(
            self.reference(lane.classes),
            setup.mesh,
            num_shards=setup.zero_ranks,
            ep=setup.ep,
            has_whole_experts=setup.has_whole_experts,
            costs=self.link_costs,
        )

    def lane_profile(self, lane: Lane, setup: StepSetup, is_sp: bool) -> Profile:
        """Each unit on the class of its stage."""
        profiles = {number: self._profile_of(lane, setup, is_sp, number) for number in {*lane.classes}}
        if len(profiles) == 1:
            return profiles[lane.classes[0]]
        of_stage = classes_of_stages(lane, setup)
        stops = (*setup.starts[1:], len(self.folded.units))
        units = tuple(
            unit
            for number, start, stop in zip(of_stage, setup.starts, stops, strict=True)
            for unit in profiles[number].units[start:stop]
        )
        return replace(profiles[lane.classes[0]], units=units)

    def _profile_of(self, lane: Lane, setup: StepSetup, is_sp: bool, number: int) -> Profile:
        """The units on one class; ranks that share sequences or experts, which no search over several classes offers, are asked alone."""
        tp = setup.mesh.tp
        if setup.ep == setup.mesh.cp == 1 and not setup.has_whole_experts:
            return self.profile(tp, is_sp, number, lane.size)
        profiler = self.profiler(tp, is_sp, number)
        if setup.has_whole_experts:
            profiler = profiler.with_whole_experts()
        return profiler.at(lane.size, self.links(lane, setup))

    def predict(
        self, lane: Lane, setup: StepSetup, is_sp: bool, memory: MemoryModel | None = None
    ) -> Prediction:
        """A step as this lane has it. ``mfu`` are FLOPs a second: how many there could be depends on all devices."""
        links = self.links(lane, setup)
        sized = replace(setup, microbatch=lane.size)
        found = predict_step(self.lane_profile(lane, setup, is_sp), sized, links, memory)
        rate = links.cluster.device.rate(setup.precision) * setup.mesh.world_size
        return replace(found, mfu=found.mfu * rate)


def classes_of_stages(lane: Lane, setup: StepSetup) -> list[int]:
    """The class that each stage lies on."""
    found = [0] * setup.num_stages
    for rank, number in enumerate(lane.classes):
        for stage in setup.stages_of(rank):
            found[stage] = number
    return found
