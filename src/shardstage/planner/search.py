"""``Searcher``: the fastest plan of the declared space that fits, with a certificate.

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
from functools import cached_property, partial
from itertools import islice
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from shardstage.cluster import Cluster, more_devices, preset_names
from shardstage.cost import Prediction
from shardstage.cost.offload import host_of
from shardstage.cost.readings import Readings
from shardstage.errors import PlanError
from shardstage.graph import ModelGraph
from shardstage.layout import balanced_sizes
from shardstage.plan import Plan, Precision, Request, shorthand
from shardstage.plan.complete import ranges
from shardstage.plan.modules import require_modules
from shardstage.planner.bounds import Bounds, bounded
from shardstage.planner.certificate import Certificate
from shardstage.planner.figures import Figures
from shardstage.planner.found import KEPT_RUNNERS_UP, Found, Walk, mesh_key, pareto
from shardstage.planner.lattice import Lattice
from shardstage.planner.pricing import Priced, Pricing, TooSlow
from shardstage.planner.space import Choice, Savers, Space, declared_space, ladder
from shardstage.planner.terms import BoundSettings
from shardstage.planner.unmet import unmet
from shardstage.units import dtype_bytes, format_bytes

__all__ = ["Candidate", "SearchResult", "Searcher", "as_plan", "pareto", "usable_bytes"]

USABLE_MEMORY_RATIO: Final = MappingProxyType({"cuda": 0.92})
"""What a device's memory holds beside tensors of a step: CUDA's context, NCCL's buffers and what the allocator cannot use; our estimate."""

MIN_RUNNERS_UP: Final = 3
MAX_PRUNED_PRICED: Final = 12
"""Where fewer others were priced, some that bounds had ruled out are, so that there is something to compare with."""

SCOUTED_GROUPS: Final = (32, 128)
"""So many groups are looked at before all others, and then so many of those that may be better than what was found."""

MAX_SCOUTED: Final = 24
"""Choices that a scout prices in search of a plan that fits."""

WORTH_SHOWING: Final = 4.0
"""A plan that takes so many times as long is nothing to compare with."""

MAX_DIVES: Final = 8
"""Choices that are priced in search of a better plan than is known."""

LIKELY_RATIO: Final = 0.75
"""A choice whose bound on memory is so much of the limit mostly fits."""

FIRST_SHOWN: Final = 8
"""So many groups are looked at first where all that is wanted is something to compare with."""

FIRST_BLOCK: Final = 64
LARGEST_BLOCK: Final = 256
"""Groups that are bounded together: some hundred thousand rows, so that arrays stay in the caches."""


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


def usable_bytes(cluster: Cluster) -> int:
    """What the tensors of a step may take on a device of the cluster."""
    return int(USABLE_MEMORY_RATIO.get(cluster.device.kind, 1.0) * cluster.device.memory_bytes)


class Searcher:
    """One space; it is searched again more quickly under another memory limit, as what units cost does not depend on it. ``rungs`` are the
    savers that are searched one after the other until something fits."""

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
        readings: Readings | None = None,
    ) -> None:
        check_size(cluster, num_ranks)
        request = fix or Request()
        require_modules(request.recompute_modules, graph, is_compiled=request.is_compiled)
        self.graph = graph
        self.cluster = cluster
        self.precision: Precision = precision
        self.global_batch = global_batch
        self.sequence = sequence
        self.is_compiled = request.is_compiled
        self.recompute_modules = request.recompute_modules
        self.pricing = Pricing(
            graph,
            cluster,
            num_ranks=num_ranks,
            global_batch=global_batch,
            sequence=sequence,
            precision=precision,
            is_compiled=self.is_compiled,
            modules=self.recompute_modules,
            readings=readings,
            **({"modes": (request.recompute,)} if "recompute" in fixed else {}),
        )
        has_host = host_of(cluster.device) is not None
        self.rungs = ladder(precision, request, fixed, has_host=has_host)
        self._fixed = fixed
        self._declared = partial(
            declared_space,
            graph,
            cluster,
            num_ranks=num_ranks,
            global_batch=global_batch,
            sequence=sequence,
            num_units=self.pricing.num_units,
            may_have_whole_experts=self.pricing.folded.can_have_whole_experts,
            fix=fix,
            is_runnable=is_runnable,
            savers=self.rungs[0],
        )
        self.space: Space = self._declared(fixed=fixed)
        self._settings = _bound_settings(self.pricing, precision, cluster)
        self.lattice = Lattice(self.space, self.pricing.costs, self.pricing.num_units)
        self.use(self.rungs[0])

    def best(self, limit_bytes: int) -> SearchResult:
        """The fastest plan within a limit, with savers only where nothing fits without; ``PlanError`` where nothing does with them."""
        without, found = 0, Found()
        for savers in self.rungs:
            self.use(savers)
            found = self._search(limit_bytes)
            if found.best is not None:
                return self._result(found, found.best, limit_bytes, without)
            without += found.counts.enumerated
        raise self._nothing_fits(found, limit_bytes)

    def use(self, savers: Savers) -> None:
        """From here on plans are bounded and priced with these savers."""
        self.space = replace(self.space, savers=savers)
        self.pricing.savers = savers
        master_bytes = self._settings.master_bytes
        self._settings = replace(
            self._settings,
            gradient_bytes=dtype_bytes(savers.gradient_dtype) if savers.gradient_dtype else master_bytes,
            is_offloaded=savers.offload == "optimizer",
        )

    def _search(self, limit_bytes: int) -> Found:
        """All of the space within a limit: blocks of groups are bounded, best first, and what of them is open is priced, best first."""
        self._settings = replace(self._settings, limit_bytes=limit_bytes)
        found = Found()
        found.counts.by_rule = self.lattice.num_by_rule
        self._scout(limit_bytes, found)
        walks: list[tuple[float, int, Walk]] = []
        for number, (least_s, groups) in enumerate(self._blocks()):
            while walks and walks[0][0] < least_s:
                self._price_next(walks, limit_bytes, found)
            if least_s >= found.best_s:
                found.prune(least_s, int(self.lattice.num_choices[groups].sum()))
                continue
            walk = self._walk(groups, limit_bytes, found)
            self._dive(walk, limit_bytes, found)
            heapq.heappush(walks, (walk.least_s, number, walk))
        while walks:
            self._price_next(walks, limit_bytes, found)
        return found

    def _scout(self, limit_bytes: int, found: Found) -> None:
        """Looks for a good plan in groups here and there, before any choice is counted: the better what is known, the fewer choices
        need a close bound. Schedules are those of fewest stages a rank, whose bounds are cheap."""
        for number in SCOUTED_GROUPS if self.lattice.groups else ():
            groups = np.flatnonzero(self._least_s < found.best_s)
            groups = groups[np.argsort(self._least_s[groups], kind="stable")]
            walk = self._scouted(groups[:: -(-len(groups) // number) or 1], limit_bytes, found.best_s)
            if found.best is None:
                walk.prefer(limit_bytes * LIKELY_RATIO)
            num_left = MAX_SCOUTED
            while num_left > 0 and walk.least_s < found.best_s:
                choice = walk.next()
                if choice not in found.scouted:
                    found.scouted[choice] = self._outcome(choice, limit_bytes, found.best_s)
                    found.take(found.scouted[choice])
                num_left = num_left - 1 if found.best is None else min(num_left - 1, MAX_DIVES)

    def _scouted(self, groups: Any, limit_bytes: int, below_s: float) -> Walk:
        """The choices of groups that may fit and take less and have fewest stages a rank, in the order of their bounds."""
        least = min((schedule.per_rank for schedule in self.lattice.schedules), default=1)
        return Walk.of(self.bounds(groups, below_s, least), limit_bytes, below_s)

    def _dive(self, walk: Walk, limit_bytes: int, found: Found) -> None:
        """Prices the first choices of a new walk until one is better than the best so far: it spares the following blocks most of their
        work. While nothing fits at all, those come first whose bound on memory leaves room."""
        best_s, is_first = found.best_s, found.best is None
        if is_first:
            walk.prefer(limit_bytes * LIKELY_RATIO)
        for _ in range(MAX_DIVES):
            if walk.least_s >= found.best_s or found.best_s < best_s:
                break
            self._price(walk, limit_bytes, found)
        if is_first:
            walk.prefer(limit_bytes)

    def _price_next(self, walks: list[tuple[float, int, Walk]], limit_bytes: int, found: Found) -> None:
        """Prices the open choice of the least bound, or leaves out a walk of which none can be better."""
        least_s, number, walk = heapq.heappop(walks)
        if least_s >= found.best_s:
            found.prune(least_s, walk.num_left)
        elif walk.num_left:
            self._price(walk, limit_bytes, found)
            heapq.heappush(walks, (walk.least_s, number, walk))

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
                needs=str(self.space.savers.beyond(self.rungs[0])),
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
        plan = as_plan(self.graph, priced, self.precision, is_compiled=self.is_compiled)
        return replace(plan, recompute_modules=self.recompute_modules) if plan.is_selective else plan

    @cached_property
    def _figures(self) -> Figures:
        return self.pricing.figures(self.lattice.groups)

    @cached_property
    def _least_s(self) -> Any:
        """[group]: a bound from the seconds of its tokens alone: all ranks compute all the time.

        seconds >= (batch / microbatch) × seconds of all units × (tp × cp / ranks)
        """
        groups = self.lattice.groups
        share = np.array([g.tp * g.cp / g.microbatch for g in groups]) / self.space.num_ranks
        return self.global_batch * self._figures.units_s * share * self.pricing.least_factor

    def _blocks(self, number: int = FIRST_BLOCK) -> Iterator[tuple[float, Any]]:
        """Groups in the order of their bounds, each block with its first one's: few at first, as a good plan spares most of the others."""
        order: Any = np.argsort(self._least_s, kind="stable") if self.lattice.groups else []
        start = 0
        while start < len(order):
            block = order[start : start + number]
            yield float(self._least_s[block[0]]), block
            start, number = start + number, min(2 * number, LARGEST_BLOCK)

    def bounds(self, groups: Any, below_s: float = math.inf, most_per_rank: float = math.inf) -> Bounds:
        """Bounds of the choices of groups, given by their numbers in the lattice."""
        figures, settings = self._figures, self._settings
        return bounded(self.lattice, figures, groups, settings, self.pricing.even, below_s, most_per_rank)

    def _walk(self, groups: Any, limit_bytes: int, found: Found) -> Walk:
        """The choices of groups that may fit and be better than the best so far, in the order of their bounds."""
        bounds = self.bounds(groups, found.best_s)
        seconds, num_bytes = bounds.seconds.ravel(), bounds.least_bytes.ravel()
        is_offered = np.isfinite(seconds)
        is_large = is_offered & (num_bytes > limit_bytes)
        is_slow = is_offered & ~is_large & (seconds >= found.best_s)
        found.counts.by_memory += bounds.num_large + int(is_large.sum())
        found.least_bytes = min(found.least_bytes, bounds.least_large_bytes, num_bytes.min(initial=math.inf))
        found.prune(bounds.least_slow_s, bounds.num_slow)
        least_slow_s = float(seconds.min(initial=math.inf, where=is_slow))
        found.prune(least_slow_s, int(is_slow.sum()))
        return Walk.of(bounds, limit_bytes, found.best_s)

    def _price(self, walk: Walk, limit_bytes: int, found: Found) -> None:
        """Prices the next choice of a walk, unless a scout did."""
        choice = walk.next()
        if choice in found.scouted:
            outcome = found.scouted[choice]
        else:
            outcome = self._outcome(choice, limit_bytes, found.best_s)
            found.take(outcome)
        if outcome is None:
            found.counts.unfit += 1
        else:
            found.counts.priced += 1

    def _outcome(self, choice: Choice, limit_bytes: int, below_s: float) -> Priced | TooSlow | None:
        """The price of a choice, or that it cannot come below; None where it does not fit."""
        try:
            return self.pricing.price(choice, limit_bytes, below_s)
        except TooSlow as slower:
            return slower

    def _next_best(self, found: Found, limit_bytes: int) -> list[Priced]:
        """The best of other meshes that were priced and fit; what a slower choice's ranks hold was not asked so far."""
        for mesh, slower in sorted(found.slower.items(), key=lambda item: item[1].seconds):
            ahead = [priced for priced in found.runners_up() if priced.seconds < slower.seconds]
            if len(ahead) >= KEPT_RUNNERS_UP:
                break
            if slower.seconds < found.seconds_of(mesh):
                found.take(self.pricing.price(slower.choice, limit_bytes))
        for choice in islice(self._pruned_choices(found, limit_bytes), MAX_PRUNED_PRICED):
            if len(found.runners_up()) >= MIN_RUNNERS_UP:
                break
            found.take(self.pricing.price(choice, limit_bytes))
        return found.runners_up()

    def _pruned_choices(self, found: Found, limit_bytes: int) -> Iterator[Choice]:
        """Of meshes that nothing was priced of, the choice of fewest stages a rank that has the least bound, nearly in their order."""
        tried = {*found.by_mesh, *found.slower}
        for _, groups in self._blocks(FIRST_SHOWN):
            walk = self._scouted(groups, limit_bytes, WORTH_SHOWING * found.best_s)
            while walk.num_left:
                choice = walk.next()
                key = mesh_key(choice.mesh, choice.group.ep)
                if key not in tried:
                    tried.add(key)
                    yield choice

    def _runners_up(self, found: Found, limit_bytes: int) -> Iterator[Candidate]:
        for priced in self._next_best(found, limit_bytes):
            plan = self.as_plan(priced)
            yield Candidate(
                text=shorthand(plan, default_precision=self.precision),
                prediction=priced.prediction,
                plan=plan,
            )

    def _nothing_fits(self, found: Found, limit_bytes: int) -> PlanError:
        num_ranks = self.space.num_ranks
        if found.least_bytes == math.inf:
            return self._nothing_declared()
        least = int(found.least_bytes)
        needed = max(least, limit_bytes + 1)
        of_parts = "parameters, optimizer and one microbatch take at least " + format_bytes(least)
        more = num_ranks * max(2, -(-needed // limit_bytes))
        hint = _more_ranks(self.cluster, more)
        if 2 * needed <= usable_bytes(self.cluster):
            hint += f", or --max-memory {format_bytes(2 * needed).replace(' ', '')}"
        return PlanError(
            f"no plan for {_ranks(num_ranks)} fits into {format_bytes(limit_bytes)} a rank; "
            + (of_parts if least > limit_bytes else "whatever the stages recompute, one of them takes more"),
            hint=hint,
        )

    def _nothing_declared(self) -> PlanError:
        """Names the decisions of which each, left out alone, leaves a choice."""
        num_ranks, batch = self.space.num_ranks, self.global_batch
        if not self._fixed and not self.space.uses_all_ranks:
            return PlanError(
                f"a batch of {batch} samples cannot be shared by {_ranks(num_ranks)} in any way",
                hint=f"--batch {num_ranks}",
            )
        spaces = {name: self._declared(fixed=self._fixed - {name}) for name in sorted(self._fixed)}
        costs, num_units = self.pricing.costs, self.pricing.num_units
        opening = tuple(name for name, space in spaces.items() if Lattice(space, costs, num_units).groups)
        who = f"a batch of {batch} samples on {_ranks(num_ranks)}"
        return unmet(who, self.space, self._fixed, num_units, opening=opening)


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
        etp=1 if setup.has_whole_experts else None,
        zero_ranks=setup.zero_ranks,
        gradient_dtype=priced.savers.gradient_dtype,
        offload=priced.savers.offload,
    )


def _bound_settings(pricing: Pricing, precision: Precision, cluster: Cluster) -> BoundSettings:
    """Without savers and without a limit, which ``use`` and each search add."""
    compute_bytes = dtype_bytes(precision)
    master_bytes = max(4, compute_bytes)
    return BoundSettings(
        device=cluster.device,
        compute_bytes=compute_bytes,
        master_bytes=master_bytes,
        gradient_bytes=master_bytes,
        bucket_bytes=Plan.bucket_bytes,
        least_factor=pricing.least_factor,
        modes=pricing.modes,
    )


def check_size(cluster: Cluster, num_ranks: int) -> None:
    if num_ranks > cluster.num_devices:
        raise PlanError(
            f"{num_ranks} ranks need as many devices, and cluster {cluster.name!r} has {cluster.num_devices}",
            hint=more_devices(cluster, num_ranks),
        )


def _ranks(number: int) -> str:
    return "1 rank" if number == 1 else f"{number} ranks"


def _more_ranks(cluster: Cluster, num_ranks: int) -> str:
    """The flag for more ranks than there are now: of devices that the cluster has, or, of a preset, of more of them."""
    is_larger = num_ranks > cluster.num_devices and cluster.name in preset_names()
    return f"--cluster {cluster.name}:{num_ranks}" if is_larger else f"--ranks {num_ranks}"
