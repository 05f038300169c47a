"""``Pricer``: what pipelines take and hold on a cluster of several device classes; ``predict_mixed`` prices any plan by it.

Each stage's units cost what they do on its own class, collectives what they do over the joint levels. What is not a unit's (the optimizer,
sums of gradients) is priced on the pipeline's class of slowest memory. Pipelines that lie on the same classes and run as large
microbatches are alike (a *lane*); the slowest one sets the time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from copy import copy
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
from shardstage.cost.units import Cases, UnitCosts
from shardstage.errors import PlanError
from shardstage.graph import ModelGraph
from shardstage.layout import AXES, Mesh
from shardstage.layout.mesh import Axis
from shardstage.plan import Plan
from shardstage.plan.order import setup_of
from shardstage.plan.schedule import schedule_of
from shardstage.planner.mixed.space import Lane, Sharding

__all__ = ["LaneCosts", "class_peaks", "combined", "lanes_of", "predict_mixed"]


def predict_mixed(
    graph: ModelGraph, plan: Plan, cluster: Cluster, *, units: Sequence[int] = ()
) -> Prediction:
    """What a plan takes on a cluster of several classes: its slowest pipeline, and the most that any of them holds.

    ``units`` are ops at which a unit begins, beside those of blocks and stages. Raises ``PlanError`` where ranks that share samples or
    experts lie on two classes.
    """
    return combined([found for _, found in _predictions(graph, plan, cluster, units)], plan, cluster)


def class_peaks(
    graph: ModelGraph, plan: Plan, cluster: Cluster, *, units: Sequence[int] = ()
) -> tuple[int, ...]:
    """Bytes at the peak of the fullest rank of each class; 0 where none computes. ``units`` as for ``predict_mixed``."""
    peaks = [0] * len(cluster.parts)
    for lane, prediction in _predictions(graph, plan, cluster, units):
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


def _predictions(
    graph: ModelGraph, plan: Plan, cluster: Cluster, units: Sequence[int]
) -> list[tuple[Lane, Prediction]]:
    positions = {op.name: index for index, op in enumerate(graph.ops)}
    boundaries = tuple(positions[stage.first] for stage in plan.stages)
    folded = fold(graph, boundaries=(*boundaries, *units), modules=plan.recompute_modules)
    custom = schedule_of(plan) if plan.schedule == "custom" else None
    setup = setup_of(plan, folded, tuple(folded.unit_at(position) for position in boundaries), custom)
    costs = LaneCosts(
        cluster, folded, sequence=plan.sequence, replicate=plan.replicate, is_compiled=plan.is_compiled
    )
    is_sp = plan.is_sequence_parallel
    return [(lane, costs.predict(lane, setup, is_sp)) for lane in lanes_of(plan, cluster)]


def lanes_of(plan: Plan, cluster: Cluster) -> tuple[Lane, ...]:
    """The different pipelines of a plan."""
    _check_experts(plan, cluster)
    return tuple(
        dict.fromkeys(
            Lane(_classes_of(plan, dp, cluster), max(plan.microbatches(dp))) for dp in range(plan.mesh.dp)
        )
    )


def _classes_of(plan: Plan, dp: int, cluster: Cluster) -> tuple[int, ...]:
    """The class of each pipeline rank of a data-parallel rank."""
    mesh, found = plan.mesh, []
    for pp in range(mesh.pp):
        ranks = [mesh.rank(pp=pp, dp=dp, cp=cp, tp=tp) for cp in range(mesh.cp) for tp in range(mesh.tp)]
        numbers = {cluster.part_of(rank) for rank in ranks}
        if len(numbers) > 1:
            axis: Axis = "cp" if mesh.cp > 1 else "tp"
            what = {"cp": "context", "tp": "tensor"}[axis]
            raise PlanError(
                f"{what}-parallel ranks {ranks} lie on different devices, and the slower ones would hold the others up at every layer",
                hint=f'--plan "{axis}={math.gcd(mesh.size(axis), *(part.num_devices for part in cluster.parts))}"',
            )
        found.append(numbers.pop())
    return tuple(found)


def _check_experts(plan: Plan, cluster: Cluster) -> None:
    """Raises ``PlanError`` where experts are dealt out to ranks of two classes."""
    mesh, is_whole = plan.mesh, plan.etp == 1
    for pp in range(mesh.pp) if plan.ep > 1 else ():
        holders = [
            mesh.rank(pp=pp, dp=dp, cp=cp, tp=tp)
            for dp in range(mesh.dp)
            for cp in range(mesh.cp)
            for tp in range(mesh.tp if is_whole else 1)
        ]
        for first in range(0, len(holders), plan.ep):
            ranks = holders[first : first + plan.ep]
            if len({cluster.part_of(rank) for rank in ranks}) > 1:
                raise PlanError(
                    f"ranks {ranks} deal experts out among them and lie on different devices, and the slower ones would hold the others up "
                    "at every layer",
                    hint=f'--plan "ep={math.gcd(plan.ep, *(part.num_devices for part in cluster.parts))}"',
                )


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
            replace(
                cluster.part(number),
                levels=cluster.levels,
                collectives=(),
                num_devices=cluster.num_devices,
                calibration=cluster.calibration_of(number),
            )
            for number in range(len(cluster.parts))
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
        self._profilers: dict[tuple[int, bool, bool, int], Profiler] = {}
        self._profiles: dict[tuple[Sharding, int, int], Profile] = {}
        self._unit_links: dict[tuple[Sharding, int], Links] = {}
        self._cases: dict[tuple[Sharding, int, int], tuple[list[UnitCosts], int]] = {}

    def naming(self, modules: tuple[str, ...], of: Sharding) -> LaneCosts:
        """The same where selective recomputation means these modules, for this sharding alone."""
        named = copy(self)
        named._profiles, named._cases, named._profilers = {}, {}, {}
        for number in range(len(self.classes)):
            key = (of.tp, of.is_sequence_parallel, of.has_whole_experts, number)
            named._profilers[key] = self.profiler(of, number).naming(modules)
        return named

    def profiler(self, of: Sharding, number: int) -> Profiler:
        """Of one class: the model is sharded once for all of them, and for any ranks that share sequences or experts."""
        key = (of.tp, of.is_sequence_parallel, of.has_whole_experts, number)
        if key not in self._profilers:
            if of.has_whole_experts:
                cut = self.profiler(of._replace(has_whole_experts=False), number)
                self._profilers[key] = cut.with_whole_experts()
            elif number:
                self._profilers[key] = self.profiler(of, 0).on(self.classes[number])
            else:
                self._profilers[key] = self._shard(of.tp, of.is_sequence_parallel)
        return self._profilers[key]

    def profile(self, of: Sharding, number: int, size: int) -> Profile:
        """The units on one class for a microbatch of so many samples."""
        key = (of, number, size)
        if key not in self._profiles:
            profiler = self.profiler(of, number)
            self._profiles[key] = (
                profiler.of(*self._cases[key], size)
                if key in self._cases
                else profiler.at(size, self.unit_links(of, number))
            )
        return self._profiles[key]

    def unit_costs(self, shardings: Sequence[Sharding], sizes: Sequence[int]) -> list[list[UnitCosts]]:
        """[class][kind]: what units cost at each size in each of some shardings that differ in cp and ep alone, sharding by sharding."""
        found = []
        for number in range(len(self.classes)):
            links = [self.unit_links(of, number) for of in shardings for _ in sizes]
            cases = Cases.of([*sizes] * len(shardings), links)
            costs = self.profiler(shardings[0], number).costs(cases)
            keys = [(of, number, size) for of in shardings for size in sizes]
            self._cases.update((key, (costs, case)) for case, key in enumerate(keys))
            found.append(costs)
        return found

    def unit_links(self, of: Sharding, number: int) -> Links:
        """Who shares sequences and experts, neighbours on one class, whatever else the mesh is."""
        key = (of, number)
        if key not in self._unit_links:
            mesh = Mesh(dp=max(1, of.ep // of.cp), cp=of.cp, tp=of.tp)
            self._unit_links[key] = self._links_on(number, mesh, of)
        return self._unit_links[key]

    def _links_on(self, number: int, mesh: Mesh, of: Sharding) -> Links:
        return Links(
            self.classes[number],
            mesh,
            ep=of.ep,
            has_whole_experts=of.has_whole_experts,
            costs=self.link_costs,
        )

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
        """The units on one class; where ranks that share sequences or experts are no neighbours, for this mesh alone."""
        mesh = setup.mesh
        of = Sharding(mesh.tp, is_sp, mesh.cp, setup.ep, setup.has_whole_experts)
        if of.is_plain or mesh.order == AXES:
            return self.profile(of, number, lane.size)
        return self.profiler(of, number).at(lane.size, self._links_on(number, mesh, of))

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
