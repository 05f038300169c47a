"""``search``: the fastest plan of the declared space that fits, with a certificate.

    1  every group of choices whose units cost the same gets a bound (``bounds``), and groups are taken in its order
    2  in a group every choice gets a bound; choices are taken in its order until no bound beats the best price so far
    3  a choice is priced exactly: its stages and what each recomputes by ``stages``, the step by ``cost.predict_step``
    4  where nothing fits, all of that again with savers: gradients as narrow as computation, the optimizer offloaded, both

Nothing is left out but by a bound on time or memory, so the result is the best of the space *under the cost model*, and the certificate
counts how each choice was dealt with. The winner is the fastest to the last bit; of equal ones, the first enumerated.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from types import MappingProxyType
from typing import Final

import numpy as np

from shardstage.cluster import Cluster
from shardstage.cost import Prediction
from shardstage.cost.kernels import is_attention, is_expert
from shardstage.cost.offload import host_of
from shardstage.errors import PlanError
from shardstage.graph import ModelGraph
from shardstage.layout import balanced_sizes
from shardstage.plan import Plan, Precision, Request, shorthand
from shardstage.plan.complete import ranges
from shardstage.planner.bounds import Bounds, BoundSettings, bounds_of
from shardstage.planner.certificate import Certificate
from shardstage.planner.found import KEPT_RUNNERS_UP, Found, Walk, mesh_key, pareto
from shardstage.planner.lattice import Lattice
from shardstage.planner.pricing import Priced, Pricing, TooSlow
from shardstage.planner.space import Choice, Group, Savers, Space, declared_space, ladder
from shardstage.units import dtype_bytes, format_bytes

__all__ = ["Candidate", "SearchResult", "Searcher", "as_plan", "pareto", "search", "usable_bytes"]

USABLE_MEMORY_RATIO: Final = MappingProxyType({"cuda": 0.92})
"""What a device's memory holds beside tensors of a step: CUDA's context, NCCL's buffers and what the allocator cannot use; our estimate."""

MIN_RUNNERS_UP: Final = 3
MAX_PRUNED_PRICED: Final = 12
"""Where fewer others were priced, some that bounds had ruled out are, so that there is something to compare with."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A plan that was priced. ``text`` is its shorthand."""

    text: str
    prediction: Prediction
    plan: Plan = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """The best plan, its price, and the proof; ``runners_up`` are the best of other meshes that were priced, fastest first."""

    best: Plan
    prediction: Prediction
    certificate: Certificate
    runners_up: tuple[Candidate, ...]
    limit_bytes: int
    savers: Savers
    priced: Priced = field(repr=False)
    front: tuple[Priced, ...] = field(repr=False)


def search(
    graph: ModelGraph,
    cluster: Cluster,
    *,
    num_ranks: int,
    global_batch: int,
    sequence: int | None,
    precision: Precision = "float32",
    memory_bytes: int | None = None,
    fix: Request | None = None,
    fixed: frozenset[str] = frozenset(),
    is_runnable: bool = True,
) -> SearchResult:
    """The fastest plan for ``num_ranks`` ranks that holds at most ``memory_bytes`` a rank.

    ``fixed`` names decisions that ``fix`` has taken (``tp``, ``zero``, ``microbatch``, …). ``is_runnable`` leaves out what this release
    prices but does not run. Raises ``PlanError`` if the cluster is too small, or nothing fits.
    """
    searcher = Searcher(
        graph,
        cluster,
        num_ranks=num_ranks,
        global_batch=global_batch,
        sequence=sequence,
        precision=precision,
        fix=fix,
        fixed=fixed,
        is_runnable=is_runnable,
    )
    return searcher.best(memory_bytes or usable_bytes(cluster))


def usable_bytes(cluster: Cluster) -> int:
    """What the tensors of a step may take on a device of the cluster."""
    return int(USABLE_MEMORY_RATIO.get(cluster.device.kind, 1.0) * cluster.device.memory_bytes)


class Searcher:
    """One space; it is searched again more quickly under another memory limit, as what units cost does not depend on it."""

    def __init__(
        self,
        graph: ModelGraph,
        cluster: Cluster,
        *,
        num_ranks: int,
        global_batch: int,
        sequence: int | None,
        precision: Precision = "float32",
        fix: Request | None = None,
        fixed: frozenset[str] = frozenset(),
        is_runnable: bool = True,
    ) -> None:
        _check_size(cluster, num_ranks)
        request = fix or Request()
        self.graph = graph
        self.cluster = cluster
        self.precision: Precision = precision
        self.global_batch = global_batch
        self.sequence = sequence
        self.is_compiled = request.is_compiled
        self.pricing = Pricing(
            graph,
            cluster,
            num_ranks=num_ranks,
            global_batch=global_batch,
            sequence=sequence,
            precision=precision,
            is_compiled=self.is_compiled,
            **({"modes": (request.recompute,)} if "recompute" in fixed else {}),
        )
        has_host = host_of(cluster.device) is not None
        self._ladder = ladder(precision, request, fixed, has_host=has_host)
        self.space: Space = declared_space(
            graph,
            cluster,
            num_ranks=num_ranks,
            global_batch=global_batch,
            sequence=sequence,
            num_units=self.pricing.num_units,
            num_experts=_num_experts(graph),
            has_attention=_has_only_fused_attention(graph),
            fix=fix,
            fixed=fixed,
            is_runnable=is_runnable,
            savers=self._ladder[0],
        )
        self._settings = _bound_settings(self.pricing, precision)
        self._bounds: dict[Group, Bounds | None] = {}
        self._order: list[tuple[float, Group]] = []
        self._bounded_bytes = 0
        self._unit_bounds: dict[Group, float] = {}
        self.lattice = Lattice(self.space, self.pricing.costs, self.pricing.num_units)
        self.use(self._ladder[0])

    def best(self, limit_bytes: int) -> SearchResult:
        """The fastest plan within a limit, with savers only where nothing fits without; ``PlanError`` where nothing does with them."""
        without = 0
        for savers in self._ladder:
            self.use(savers)
            found = self._search(limit_bytes)
            if found.best is not None:
                return self._result(found, found.best, limit_bytes, without)
            without += found.counts.enumerated
        raise self._nothing_fits(limit_bytes)

    def use(self, savers: Savers) -> None:
        """From here on plans are bounded and priced with these savers."""
        if savers == self.space.savers == self.pricing.savers:
            return
        self._bounds = {}
        self.space = replace(self.space, savers=savers)
        self.pricing.savers = savers
        master_bytes = self._settings.master_bytes
        self._settings = replace(
            self._settings,
            gradient_bytes=dtype_bytes(savers.gradient_dtype) if savers.gradient_dtype else master_bytes,
            is_offloaded=savers.offload == "optimizer",
        )

    def _search(self, limit_bytes: int) -> Found:
        """All of the space within a limit."""
        if self._bounded_bytes != limit_bytes:
            self._bounds, self._bounded_bytes = {}, limit_bytes
        self._settings = replace(self._settings, limit_bytes=limit_bytes)
        found = Found()
        queue: list[tuple[float, int, Walk | Group]] = [
            (least_s, number, group) for number, (least_s, group) in enumerate(self._groups())
        ]
        found.counts.by_rule = sum(self.lattice.num_by_rule(group) for _, group in self._groups())
        while queue:
            least_s, number, item = heapq.heappop(queue)
            if least_s >= found.best_s:
                found.least_pruned_s = min(found.least_pruned_s, least_s)
                found.pruned.append((least_s, number, item))
                left = item.num_left if isinstance(item, Walk) else self.lattice.num_choices(item)
                found.counts.by_bound += left
                continue
            if isinstance(item, Walk):
                self._price(item, limit_bytes, found)
                walk: Walk | None = item
            elif (units_s := self._units_bound_s(item)) > least_s:
                heapq.heappush(queue, (units_s, number, item))
                continue
            else:
                walk = self._walk(item, limit_bytes, found)
            if walk is not None and walk.num_left:
                heapq.heappush(queue, (walk.least_s, number, walk))
        return found

    def _result(self, found: Found, best: Priced, limit_bytes: int, without: int) -> SearchResult:
        return SearchResult(
            best=self.as_plan(best),
            prediction=best.prediction,
            certificate=Certificate.of(
                graph=self.graph,
                cluster=self.cluster,
                space=self.space,
                limit_bytes=limit_bytes,
                cost_s=best.seconds,
                counts=found.counts,
                best_bound_s=found.least_pruned_s,
                needs=str(self.space.savers.beyond(self._ladder[0])),
                without=without,
            ),
            runners_up=tuple(self._runners_up(found, limit_bytes)),
            limit_bytes=limit_bytes,
            savers=self.space.savers,
            priced=best,
            front=tuple(found.front),
        )

    @property
    def num_units(self) -> int:
        return self.pricing.num_units

    def as_plan(self, priced: Priced) -> Plan:
        return as_plan(self.graph, priced, self.precision, is_compiled=self.is_compiled)

    def _groups(self) -> list[tuple[float, Group]]:
        """Groups with a bound from the seconds of their tokens alone, best first: all ranks compute all the time.

        seconds >= (batch / microbatch) × seconds of all units × (tp × cp / ranks)
        """
        if not self._order:
            found = [
                (self._seconds_of(group, self.pricing.chain(group).both_s[-1]), number, group)
                for number, group in enumerate(self.space.groups())
                if self.lattice.num_choices(group)
            ]
            self._order = [(least_s, group) for least_s, _, group in sorted(found)]
        return self._order

    def _units_bound_s(self, group: Group) -> float:
        """The same bound from what the group's units cost exactly."""
        if group not in self._unit_bounds:
            chain = self.pricing.chain(group)
            self._unit_bounds[group] = self._seconds_of(group, chain.both_s[-1])
        return self._unit_bounds[group]

    def _seconds_of(self, group: Group, units_s: float) -> float:
        share = group.tp * group.cp / self.space.num_ranks
        return self.global_batch / group.microbatch * units_s * share * self.pricing.least_factor

    def _bounds_of(self, group: Group, below_s: float = math.inf) -> Bounds | None:
        if group not in self._bounds:
            self._bounds[group] = bounds_of(
                self.lattice,
                group,
                self.pricing.chain(group),
                self.pricing.costs,
                self._settings,
                self.pricing.even,
                below_s,
            )
        return self._bounds[group]

    def _walk(self, group: Group, limit_bytes: int, found: Found) -> Walk | None:
        """The choices of a group that may fit, in the order of their bounds."""
        bounds = self._bounds_of(group, found.best_s)
        if bounds is None:
            return None
        seconds = bounds.seconds.ravel()
        too_large = (bounds.least_bytes.ravel() > limit_bytes) & np.isfinite(seconds)
        found.counts.by_memory += int(too_large.sum())
        open_ones = np.flatnonzero(np.isfinite(seconds) & ~too_large)
        return Walk(bounds, open_ones[np.argsort(seconds[open_ones], kind="stable")])

    def _price(self, walk: Walk, limit_bytes: int, found: Found) -> None:
        """Prices the next choice of a walk."""
        choice = walk.next()
        try:
            priced = self.pricing.price(choice, limit_bytes, found.best_s)
        except TooSlow as slower:
            found.counts.priced += 1
            found.add_slower(slower)
            return
        if priced is None:
            found.counts.unfit += 1
        else:
            found.counts.priced += 1
            found.add(priced)

    def _next_best(self, found: Found, limit_bytes: int) -> list[Priced]:
        """The best of other meshes that were priced and fit; what a slower choice's ranks hold was not asked so far."""
        for mesh, slower in sorted(found.slower.items(), key=lambda item: item[1].seconds):
            ahead = [priced for priced in found.runners_up() if priced.seconds < slower.seconds]
            if len(ahead) >= KEPT_RUNNERS_UP:
                break
            if slower.seconds < found.seconds_of(mesh):
                found.add_if(self.pricing.price(slower.choice, limit_bytes))
        for choice in islice(self._pruned_choices(found, limit_bytes), MAX_PRUNED_PRICED):
            if len(found.runners_up()) >= MIN_RUNNERS_UP:
                break
            found.add_if(self.pricing.price(choice, limit_bytes))
        return found.runners_up()

    def _pruned_choices(self, found: Found, limit_bytes: int) -> Iterator[Choice]:
        """Of meshes that nothing was priced of, the choice of the least bound, nearly in the order of bounds."""
        tried = {*found.by_mesh, *found.slower}
        for _, _, item in sorted(found.pruned, key=lambda pruned: pruned[:2]):
            walk = item if isinstance(item, Walk) else self._walk(item, limit_bytes, Found())
            while walk is not None and walk.num_left:
                choice = walk.next()
                if mesh_key(choice) not in tried:
                    tried.add(mesh_key(choice))
                    yield choice

    def _runners_up(self, found: Found, limit_bytes: int) -> Iterator[Candidate]:
        for priced in self._next_best(found, limit_bytes):
            plan = self.as_plan(priced)
            yield Candidate(
                text=shorthand(plan, default_precision=self.precision),
                prediction=priced.prediction,
                plan=plan,
            )

    def _nothing_fits(self, limit_bytes: int) -> PlanError:
        least = (
            min(
                (float(bounds.least_bytes[np.isfinite(bounds.seconds)].min()), group)
                for group, bounds in self._bounds.items()
                if bounds is not None and bounds.num_choices
            )
            if any(b is not None and b.num_choices for b in self._bounds.values())
            else None
        )
        num_ranks = self.space.num_ranks
        if least is None:
            return PlanError(
                f"a batch of {self.global_batch} samples cannot be shared by {num_ranks} ranks in any way that is asked for",
                hint=f"--batch {num_ranks}, or fewer --fix",
            )
        needed = max(int(least[0]), limit_bytes + 1)
        return PlanError(
            f"no plan for {num_ranks} ranks fits into {format_bytes(limit_bytes)} a rank; "
            f"parameters, optimizer and one microbatch take at least {format_bytes(int(least[0]))}",
            hint=f"--ranks {num_ranks * max(2, -(-needed // limit_bytes))}, "
            f"or --max-memory {format_bytes(2 * needed).replace(' ', '')}",
        )


def as_plan(graph: ModelGraph, priced: Priced, precision: Precision, *, is_compiled: bool = False) -> Plan:
    """The plan that a priced choice stands for."""
    setup = priced.setup
    return Plan(
        mesh=setup.mesh,
        stages=ranges(graph, priced.positions),
        global_batch=setup.global_batch,
        sequence=setup.sequence,
        microbatch=setup.microbatch,
        shares=balanced_sizes(setup.global_batch, setup.mesh.dp),
        zero=priced.choice.zero.level,
        recompute=setup.recompute,
        stage_recompute=setup.recompute_of_stages,
        schedule=priced.choice.schedule.name,
        precision=precision,
        is_sequence_parallel=priced.choice.group.is_sequence_parallel,
        is_compiled=is_compiled,
        ep=setup.ep,
        zero_ranks=setup.zero_ranks,
        gradient_dtype=priced.savers.gradient_dtype,
        offload=priced.savers.offload,
    )


def _bound_settings(pricing: Pricing, precision: Precision) -> BoundSettings:
    """Without savers and without a limit, which ``use`` and each search add."""
    compute_bytes = dtype_bytes(precision)
    master_bytes = max(4, compute_bytes)
    return BoundSettings(
        compute_bytes=compute_bytes,
        master_bytes=master_bytes,
        gradient_bytes=master_bytes,
        bucket_bytes=Plan.bucket_bytes,
        least_factor=pricing.least_factor,
        modes=pricing.modes,
    )


def _num_experts(graph: ModelGraph) -> int:
    """The number of experts of the layers that have some; 0 without any."""
    return next((graph.values[op.inputs[1]].shape[0] for op in graph.ops if is_expert(op)), 0)


def _has_only_fused_attention(graph: ModelGraph) -> bool:
    """Whether all attention runs as one kernel, which context parallelism can feed part by part."""
    return any(is_attention(op) for op in graph.ops) and not any(
        op.target.startswith(("aten.softmax", "aten._softmax")) and "mlp" not in op.module for op in graph.ops
    )


def _check_size(cluster: Cluster, num_ranks: int) -> None:
    if num_ranks > cluster.num_devices:
        raise PlanError(
            f"{num_ranks} ranks need as many devices, and cluster {cluster.name!r} has {cluster.num_devices}",
            hint=f"--cluster {cluster.name}:{num_ranks}",
        )
