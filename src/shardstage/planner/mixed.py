"""Plans for clusters of several device classes: each class gets its share of the layers, or of the batch.

    by stages    the first pipeline ranks lie on the first class, the next on the second: faster devices take more layers
    by shares    every pipeline lies on one class: faster ones take more samples of each microbatch

A step is priced pipeline by pipeline: each stage's units cost what they do on its own class (``predict_mixed``), collectives what they do
on the joint network, and the slowest pipeline sets the time. The search prices all that it enumerates, so its certificate counts no bounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from shardstage.cluster import Cluster, DeviceClass
from shardstage.cost import Links, Prediction, Profile, StepSetup, fold, predict_step
from shardstage.cost.compute import moved_s
from shardstage.cost.profile import RECOMPUTES, Profiler
from shardstage.errors import PlanError
from shardstage.graph import ModelGraph
from shardstage.graph.recompute import StageRecompute
from shardstage.layout import Mesh
from shardstage.plan import Plan, Precision, Request, shorthand
from shardstage.plan.complete import proportional_shares, ranges
from shardstage.plan.order import setup_of
from shardstage.planner.certificate import Certificate, Counts, cluster_hash
from shardstage.planner.chain import Chain, ChainCosts
from shardstage.planner.space import ZeroLevel
from shardstage.planner.stages import Fitted, best_cut
from shardstage.units import dtype_bytes, format_bytes

__all__ = ["MixedResult", "predict_mixed", "search_mixed"]

MICROBATCHES: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""Microbatches of a step, and samples of one, that are tried."""


@dataclass(frozen=True, kw_only=True)
class MixedResult:
    """The best plan for a mixed cluster, its price, and how many were priced."""

    best: Plan
    prediction: Prediction
    certificate: Certificate
    runners_up: tuple[tuple[str, Prediction], ...]


def predict_mixed(graph: ModelGraph, plan: Plan, cluster: Cluster) -> Prediction:
    """What a plan takes on a cluster of several classes: its slowest pipeline.

    Raises ``PlanError`` where a tensor-parallel group lies on two classes.
    """
    return _Pricer(graph, cluster, plan.sequence, plan.is_compiled, plan.recompute_modules).predict(plan)


class _Pricer:
    """Units of one model on each class of a cluster."""

    def __init__(
        self,
        graph: ModelGraph,
        cluster: Cluster,
        sequence: int | None,
        is_compiled: bool = False,
        modules: tuple[str, ...] = (),
    ) -> None:
        self.graph = graph
        self.cluster = cluster
        self.sequence = sequence
        self._is_compiled = is_compiled
        self.classes = [
            replace(part, levels=cluster.levels, collectives=(), num_devices=cluster.num_devices)
            for part in (cluster.part(i) for i in range(len(cluster.parts)))
        ]
        self.folded = fold(graph, modules=modules)
        self._profilers: dict[tuple[int, int, bool], Profiler] = {}
        self._profiles: dict[tuple[int, int, bool, int], Profile] = {}

    def profile(self, number: int, tp: int, is_sequence_parallel: bool, microbatch: int) -> Profile:
        """The units on one class."""
        key = (number, tp, is_sequence_parallel)
        if key not in self._profilers:
            self._profilers[key] = Profiler(
                self.folded,
                self.classes[number],
                tp=tp,
                sequence=self.sequence,
                is_sequence_parallel=is_sequence_parallel,
                is_compiled=self._is_compiled,
            )
        if (*key, microbatch) not in self._profiles:
            self._profiles[*key, microbatch] = self._profilers[key].at(microbatch)
        return self._profiles[*key, microbatch]

    def predict(self, plan: Plan) -> Prediction:
        positions = {op.name: index for index, op in enumerate(self.graph.ops)}
        starts = tuple(self.folded.unit_at(positions[stage.first]) for stage in plan.stages)
        setup = setup_of(plan, self.folded, starts)
        pipelines = {
            (self._classes_of(plan, dp), max(plan.microbatches(dp))): None for dp in range(plan.mesh.dp)
        }
        found = [self._predict(plan, setup, classes, size) for classes, size in pipelines]
        slowest = max(found, key=lambda prediction: prediction.step_time_s)
        rates = [p.num_devices * p.device.rate(plan.precision) for p in self.cluster.parts]
        flops = (
            slowest.mfu
            * slowest.step_time_s
            * plan.mesh.world_size
            * self._reference(plan).rate(plan.precision)
        )
        return replace(slowest, mfu=flops / (slowest.step_time_s * sum(rates)))

    def _reference(self, plan: Plan) -> DeviceClass:
        """The device that ``_predict`` prices what is not a unit's on: the one of slowest memory."""
        return min((each.device for each in self.classes), key=lambda device: device.bytes_per_s)

    def peaks(self, plan: Plan) -> list[tuple[int, int]]:
        """For each class that a pipeline rank lies on its number and the rank's peak bytes."""
        positions = {op.name: index for index, op in enumerate(self.graph.ops)}
        starts = tuple(self.folded.unit_at(positions[stage.first]) for stage in plan.stages)
        setup = setup_of(plan, self.folded, starts)
        told = []
        for dp in range(plan.mesh.dp):
            classes = self._classes_of(plan, dp)
            prediction = self._predict(plan, setup, classes, max(plan.microbatches(dp)))
            told += [(classes[pp], prediction.rank_peak_bytes(pp)) for pp in range(plan.mesh.pp)]
        return list(dict.fromkeys(told))

    def _predict(self, plan: Plan, setup: StepSetup, classes: tuple[int, ...], size: int) -> Prediction:
        stops = (*setup.starts[1:], len(self.folded.units))
        profiles = {
            number: self.profile(number, plan.mesh.tp, plan.is_sequence_parallel, size)
            for number in set(classes)
        }
        first = profiles[classes[0]]
        units = tuple(
            unit
            for stage, (start, stop) in enumerate(zip(setup.starts, stops, strict=True))
            for unit in profiles[classes[stage % plan.mesh.pp]].units[start:stop]
        )
        reference = min(self.classes, key=lambda each: each.device.bytes_per_s)
        links = Links(reference, plan.mesh, num_shards=plan.zero_ranks, ep=plan.ep)
        return predict_step(replace(first, units=units), replace(setup, microbatch=size), links)

    def _classes_of(self, plan: Plan, dp: int) -> tuple[int, ...]:
        """The class of each pipeline rank of a data-parallel rank."""
        mesh, found = plan.mesh, []
        for pp in range(mesh.pp):
            ranks = [mesh.rank(pp=pp, dp=dp, tp=tp) for tp in range(mesh.tp)]
            numbers = {self.cluster.part_of(rank) for rank in ranks}
            if len(numbers) > 1:
                raise PlanError(
                    f"tensor-parallel ranks {ranks} lie on different devices, and the slower ones would hold the others up at every layer",
                    hint=f'--plan "tp={math.gcd(*(part.num_devices for part in self.cluster.parts))}"',
                )
            found.append(numbers.pop())
        return tuple(found)


def search_mixed(
    graph: ModelGraph,
    cluster: Cluster,
    *,
    global_batch: int,
    sequence: int | None,
    precision: Precision,
    limits: Sequence[int],
    fix: Request | None = None,
    fixed: frozenset[str] = frozenset(),
) -> MixedResult:
    """The best plan for all devices of a mixed cluster; ``limits`` are the bytes that a rank of each class may hold.

    Raises ``PlanError`` where nothing fits.
    """
    pricer = _Pricer(graph, cluster, sequence)
    counts = Counts()
    told: list[tuple[float, Plan, Prediction]] = []
    for plan in _candidates(pricer, global_batch, precision, limits, fix or Request(), fixed):
        if any(peak > limits[number] for number, peak in pricer.peaks(plan)):
            counts.unfit += 1
            continue
        prediction = pricer.predict(plan)
        counts.priced += 1
        told.append((prediction.step_time_s, plan, prediction))
    if not told:
        raise PlanError(
            f"none of {counts.enumerated} plans for {cluster.name} fits into {' and '.join(format_bytes(b) for b in limits)} a rank",
            hint="--max-memory with more, a larger cluster, or fewer --fix",
        )
    told.sort(key=lambda item: item[0])
    seconds, best, prediction = told[0]
    return MixedResult(
        best=best,
        prediction=prediction,
        certificate=Certificate(
            graph="",
            cluster=cluster_hash(cluster),
            space="mixed: by stages, by shares",
            limit_bytes=min(limits),
            cost_s=seconds,
            best_bound_s=seconds,
            priced=counts.priced,
            unfit=counts.unfit,
            by_bound=0,
            by_memory=0,
            by_rule=0,
        ),
        runners_up=tuple((shorthand(plan, default_precision=precision), p) for _, plan, p in told[1:6]),
    )


def _candidates(
    pricer: _Pricer,
    global_batch: int,
    precision: Precision,
    limits: Sequence[int],
    request: Request,
    fixed: frozenset[str],
) -> Iterator[Plan]:
    parts = pricer.cluster.parts
    common = math.gcd(*(part.num_devices for part in parts))
    node = pricer.cluster.devices_per(pricer.cluster.levels[0])
    tps = [tp for tp in range(1, node + 1) if common % tp == 0]
    zeros: tuple[ZeroLevel, ...] = (request.zero,) if "zero" in fixed else (0, 1, 2, 3)
    for tp in [request.tp] if "tp" in fixed else tps:
        for zero in zeros:
            if "pp" not in fixed or request.pp == 1:
                yield from _by_shares(pricer, tp, zero, global_batch, precision)
            for dp in [d for d in range(1, common // tp + 1) if (common // tp) % d == 0]:
                pp = sum(part.num_devices // (tp * dp) for part in parts)
                if zero < 2 and (zero == 0 or dp > 1) and ("pp" not in fixed or request.pp == pp):
                    yield from _by_stages(pricer, tp, dp, zero, global_batch, precision, limits)


def _by_shares(
    pricer: _Pricer, tp: int, zero: ZeroLevel, global_batch: int, precision: Precision
) -> Iterator[Plan]:
    """No pipeline: data-parallel ranks of a class take samples in proportion to its speed."""
    parts = pricer.cluster.parts
    dps = [part.num_devices // tp for part in parts]
    dp = sum(dps)
    for m in MICROBATCHES:
        if global_batch < dp * m:
            break
        weights = [1.0] * len(parts)
        for _ in range(3):  # speed depends a little on the microbatch that it yields
            total = sum(w * n for w, n in zip(weights, dps, strict=True))
            sizes = [max(1, round(global_batch * w / total / m)) for w in weights]
            seconds = [
                Chain(pricer.profile(i, tp, tp > 1, size)).both_s[-1] / size for i, size in enumerate(sizes)
            ]
            weights = [1 / each for each in seconds]
        scaled = [max(1, round(1000 * w / max(weights))) for w in weights]
        shares = proportional_shares(
            global_batch, [w for w, n in zip(scaled, dps, strict=True) for _ in range(n)]
        )
        microbatch = -(-max(shares) // m)
        for mode in RECOMPUTES:
            plan = _plan(pricer, Mesh(dp=dp, tp=tp), (0,), (mode,), zero, shares, microbatch, precision)
            if min(shares) >= plan.num_microbatches:
                yield plan


def _by_stages(
    pricer: _Pricer,
    tp: int,
    dp: int,
    zero: ZeroLevel,
    global_batch: int,
    precision: Precision,
    limits: Sequence[int],
) -> Iterator[Plan]:
    """One pipeline through all classes: stages cut exactly, each priced on its own class."""
    parts = pricer.cluster.parts
    per_part = [part.num_devices // (tp * dp) for part in parts]
    mesh = Mesh(pp=sum(per_part), dp=dp, tp=tp)
    if mesh.pp > len(pricer.folded.units) or global_batch < dp:
        return
    class_of = [number for number, n in enumerate(per_part) for _ in range(n)]
    shares = proportional_shares(global_batch, (1,) * dp)
    for size in MICROBATCHES:
        m = -(-max(shares) // size)
        if size > max(shares) or -(-max(shares) // m) != size or min(shares) < m:
            continue
        setup = StepSetup(
            mesh=mesh,
            starts=tuple(range(mesh.pp)),
            microbatch=size,
            num_microbatches=m,
            global_batch=global_batch,
            sequence=pricer.sequence,
            zero=zero,
            recompute="none",
            schedule="1f1b",
            precision=precision,
            bucket_bytes=Plan.bucket_bytes,
        )
        costs = _StagesOfClasses(pricer, setup, class_of, limits, dtype_bytes(precision))
        cut = best_cut(costs, mesh.pp, m)
        if cut is not None:
            yield _plan(pricer, mesh, cut.starts, cut.recompute, zero, shares, size, precision)


class _StagesOfClasses:
    """``ChainCosts`` of the class that each stage lies on."""

    def __init__(
        self,
        pricer: _Pricer,
        setup: StepSetup,
        class_of: Sequence[int],
        limits: Sequence[int],
        compute_bytes: int,
    ) -> None:
        tp = setup.mesh.tp
        self._of = [
            ChainCosts(
                Chain(pricer.profile(number, tp, tp > 1, setup.microbatch), layers=pricer.folded.layers),
                setup,
                limits[number],
                moved_s(setup.accumulation_bytes, each.device) if setup.num_microbatches > 1 else 0.0,
            )
            for number, each in enumerate(pricer.classes)
        ]
        self._class_of = class_of

    @property
    def num_units(self) -> int:
        return self._of[0].num_units

    def plain_s(self, stage: int, start: int, stop: int) -> float:
        return self._of[self._class_of[stage]].plain_s(stage, start, stop)

    def fitted(self, stage: int, start: int, stop: int) -> Fitted | None:
        return self._of[self._class_of[stage]].fitted(stage, start, stop)


def _plan(
    pricer: _Pricer,
    mesh: Mesh,
    starts: tuple[int, ...],
    modes: tuple[StageRecompute, ...],
    zero: ZeroLevel,
    shares: tuple[int, ...],
    microbatch: int,
    precision: Precision,
) -> Plan:
    is_uniform = len(set(modes)) == 1
    return Plan(
        mesh=mesh,
        stages=ranges(pricer.graph, [pricer.folded.units[start].start for start in starts]),
        global_batch=sum(shares),
        sequence=pricer.sequence,
        microbatch=microbatch,
        shares=shares,
        zero=zero,
        recompute=modes[0] if is_uniform else "none",
        stage_recompute=() if is_uniform else modes,
        precision=precision,
        is_sequence_parallel=mesh.tp > 1,
    )
