"""``MixedSearcher``: the fastest plan of the declared space for a cluster of several device classes, with a certificate.

Shardings are taken by a bound of their own. Of each the arrangements that may beat the best plan so far are bounded (``bounds``) and
some of their choices priced (``pricing``). Then all that is open is priced best bound first until no bound beats the best price; where
nothing fits, again with savers.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import itemgetter
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from shardstage.cluster import Cluster
from shardstage.cost import Prediction
from shardstage.cost.offload import host_of
from shardstage.cost.readings import Readings
from shardstage.errors import PlanError
from shardstage.graph import ModelGraph
from shardstage.plan import Plan, Precision, Request
from shardstage.plan.modules import require_modules
from shardstage.planner.certificate import Certificate, Counts, cluster_hash
from shardstage.planner.mixed.bounds import Bounds, bounds_of
from shardstage.planner.mixed.figures import MixedFigures
from shardstage.planner.mixed.priced import MixedPriced, TooLong
from shardstage.planner.mixed.pricing import MixedPricing
from shardstage.planner.mixed.shares import ClassShare, class_shares
from shardstage.planner.mixed.space import Arrangement, MixedChoice, MixedSpace, Sharding
from shardstage.planner.search import Searcher, usable_bytes
from shardstage.planner.space import Savers, declared_space, ladder
from shardstage.planner.unmet import unmet
from shardstage.units import format_bytes

__all__ = ["MixedResult", "MixedSearcher"]

KEPT_RUNNERS_UP: Final = 5
TRIED_OF_MESH: Final = 2
"""Of each mesh that may be a runner-up so many choices of the least bounds are priced, and as many with one stage a rank, whose bounds
know more of memory."""


SCOUTED_SHARDINGS: Final = 6
SCOUTED_ARRANGEMENTS: Final = 128
"""Of so many shardings so many arrangements are looked at before all others."""

SCOUTED_MESHES: Final = 4
"""Of so many meshes of a sharding the choice of the least bound is priced first."""


@dataclass(frozen=True, kw_only=True)
class MixedResult:
    """The best plan for a mixed cluster, its price, and the proof.

    The plan's ranks count through ``cluster``, the devices that compute. ``shares`` say what each class does; ``runners_up`` are the best
    of other meshes that were priced, ``fitting`` all that were priced to the end and fit.
    """

    best: Plan
    prediction: Prediction
    certificate: Certificate
    cluster: Cluster
    shares: tuple[ClassShare, ...]
    savers: Savers
    priced: MixedPriced = field(repr=False)
    runners_up: tuple[MixedPriced, ...] = field(repr=False)
    fitting: tuple[MixedPriced, ...] = field(repr=False)

    @property
    def limits(self) -> tuple[int, ...]:
        """What a rank of each class may hold."""
        return tuple(share.limit_bytes for share in self.shares)


class MixedSearcher:
    """One space; it may be searched again under other limits. ``rungs`` are as ``Searcher``'s."""

    def __init__(
        self,
        graph: ModelGraph,
        cluster: Cluster,
        *,
        global_batch: int,
        sequence: int | None,
        precision: Precision,
        fix: Request | None = None,
        fixed: frozenset[str] = frozenset(),
        is_runnable: bool = False,
        readings: Readings | None = None,
    ) -> None:
        request = fix or Request()
        self._asked: dict[str, Any] = {
            "global_batch": global_batch,
            "sequence": sequence,
            "precision": precision,
            "fix": fix,
            "is_runnable": is_runnable,
            "readings": readings,
        }
        require_modules(request.recompute_modules, graph, is_compiled=request.is_compiled)
        self.graph = graph
        self.cluster = cluster
        self.pricing = MixedPricing(
            graph,
            cluster,
            global_batch=global_batch,
            sequence=sequence,
            precision=precision,
            is_compiled=request.is_compiled,
            asked=request.recompute if "recompute" in fixed else None,
            modules=request.recompute_modules,
            readings=readings,
        )
        declared = declared_space(
            graph,
            cluster,
            num_ranks=cluster.num_devices,
            global_batch=global_batch,
            sequence=sequence,
            num_units=self.pricing.num_units,
            may_have_whole_experts=self.pricing.folded.can_have_whole_experts,
            fix=fix,
            fixed=fixed,
            is_runnable=is_runnable,
        )
        self.space = MixedSpace(
            declared=declared,
            num_devices=tuple(part.num_devices for part in cluster.parts),
            num_units=self.pricing.num_units,
            is_scalable=graph.is_scalable,
        )
        has_host = all(host_of(part.device) is not None for part in cluster.parts)
        self.fixed = fixed
        self.rungs = ladder(precision, request, fixed, has_host=has_host)
        self._figures: dict[Sharding, MixedFigures] = {}
        self._arrangements: dict[Sharding, list[Arrangement]] = {}
        self.use(self.rungs[0])

    def use(self, savers: Savers) -> None:
        """From here on plans are bounded and priced with these savers."""
        self.pricing.savers = savers

    @cached_property
    def capacities(self) -> tuple[int, ...]:
        """What the tensors of a step may take on a device of each class."""
        return tuple(usable_bytes(self.cluster.part(number)) for number in range(len(self.cluster.parts)))

    def on(self, number: int) -> Searcher:
        """The search over the devices of one class alone, with the same decisions fixed."""
        part = replace(self.cluster.part(number), calibration=self.cluster.calibration_of(number))
        return Searcher(self.graph, part, num_ranks=part.num_devices, fixed=self.fixed, **self._asked)

    def taking(self, priced: MixedPriced, found: MixedResult) -> MixedResult:
        """What was found, with another plan than the best; the proof stays that of the best."""
        return replace(
            found,
            best=priced.plan,
            prediction=priced.prediction,
            cluster=self.cluster.with_parts(priced.choice.arrangement.used),
            shares=tuple(class_shares(self.pricing, priced, found.limits)),
            priced=priced,
        )

    def without(self, name: str) -> MixedSearcher:
        """The search where one decision is no longer fixed."""
        return MixedSearcher(self.graph, self.cluster, fixed=self.fixed - {name}, **self._asked)

    def best(self, limits: Sequence[int]) -> MixedResult:
        """The fastest plan within limits for each class; ``PlanError`` where none fits, savers or not."""
        found = self.find(limits)
        if found is None:
            raise self.refusal(limits)
        return found

    def refusal(self, limits: Sequence[int]) -> PlanError:
        """That no plan fits into the limits."""
        there = " and ".join(map(format_bytes, limits))
        tried = sum(self.space.num_choices(self.arrangements(each))[0] for each in self.space.shardings)
        return PlanError(
            f"none of {len(self.rungs) * tried:,} plans for {self.cluster.name} fits into {there} a rank",
            hint="--max-memory with more, a larger cluster, or fewer --fix",
        )

    def find(self, limits: Sequence[int]) -> MixedResult | None:
        """The fastest plan within limits for each class; None where none fits, savers or not. ``PlanError`` where there is none at all."""
        without = 0
        for savers in self.rungs:
            self.use(savers)
            found = _Found()
            self._search(limits, found)
            if found.best is not None:
                return self._result(found, found.best, limits, without)
            without += found.counts.enumerated
        if without:
            return None
        if self.fixed:
            raise unmet(self.cluster.name, self.space.declared, self.fixed, self.space.num_units)
        batch = self.space.declared.global_batch
        raise PlanError(
            f"a batch of {batch} samples cannot be shared by {self.cluster.name} in any way",
            hint="--batch with more",
        )

    def figures(self, sharding: Sharding) -> MixedFigures:
        """What units cost under a sharding: found for all that differ from it in cp and ep alone."""
        if sharding not in self._figures:
            alike = [each for each in self.space.shardings if each.cut == sharding.cut]
            found = MixedFigures.of(self.pricing, alike, self.space.sizes)
            self._figures.update(zip(alike, found, strict=True))
        return self._figures[sharding]

    def arrangements(self, sharding: Sharding) -> list[Arrangement]:
        """All of a sharding."""
        if sharding not in self._arrangements:
            whole_s = self.figures(sharding).whole_s
            self._arrangements[sharding] = [*self.space.arrangements(sharding, whole_s)]
        return self._arrangements[sharding]

    def bounds(self, limits: Sequence[int]) -> Iterator[Bounds]:
        """Of all choices, sharding by sharding."""
        for sharding in self.space.shardings:
            if arrangements := self.arrangements(sharding):
                yield bounds_of(self.pricing, self.space, self.figures(sharding), arrangements, limits)

    def _search(self, limits: Sequence[int], found: _Found) -> None:
        """All choices best bound first; what is open when a bound reaches the best price is left out by it."""
        tables, shardings = [], self._by_bound()
        self._scout_loosely(shardings, found, limits)
        for least_s, sharding in shardings:
            table = self._table(sharding, limits, found, least_s)
            if table is not None:
                tables.append(table)
                self._scout(table, found, limits)
        found.counts.by_rule += sum(each.num_by_rule for each in tables)
        found.counts.by_memory += sum(int(each.is_large.sum()) for each in tables)
        seconds = [np.where(each.is_large, np.inf, each.seconds).ravel() for each in tables]
        firsts = np.cumsum([0, *(len(each) for each in seconds)])
        flat = np.concatenate(seconds) if seconds else np.zeros(0)
        order = np.argsort(flat, kind="stable")[: int(np.isfinite(flat).sum())]
        found.order = _Order(tables, firsts, order)
        for place, index in enumerate(order):
            if flat[index] >= found.best_s:
                found.prune(float(flat[index]), len(order) - place)
                break
            self._price(found.order.choice(int(index)), limits, found)

    def _by_bound(self) -> list[tuple[float, Sharding]]:
        """Shardings with the least seconds of a step, least first."""
        factor, batch = self.pricing.least_ratio, self.pricing.global_batch
        found = [
            (factor * self.figures(each).least_s(self.space.num_devices, batch), each)
            for each in self.space.shardings
        ]
        return sorted(found, key=itemgetter(0))

    def _table(
        self, sharding: Sharding, limits: Sequence[int], found: _Found, least_s: float
    ) -> Bounds | None:
        """Bounds of the arrangements of a sharding that may be better than the best so far; None where none may."""
        arrangements, figures = self.arrangements(sharding), self.figures(sharding)
        seconds = np.full(len(arrangements), least_s)
        if least_s < found.best_s < math.inf:
            seconds = np.maximum(least_s, self.pricing.least_ratio * figures.loosest_s(arrangements))
        is_slow = seconds >= found.best_s
        slow = [arrangements[row] for row in np.flatnonzero(is_slow)]
        number, by_rule = self.space.num_choices(slow)
        found.counts.by_rule += by_rule
        found.prune(float(seconds[is_slow].min(initial=math.inf)), number - by_rule)
        arrangements = [arrangements[row] for row in np.flatnonzero(~is_slow)]
        if not arrangements:
            return None
        return bounds_of(self.pricing, self.space, figures, arrangements, limits, found.best_s)

    def _scout_loosely(
        self, shardings: Sequence[tuple[float, Sharding]], found: _Found, limits: Sequence[int]
    ) -> None:
        """Looks for a good plan among some arrangements of the first shardings, so that not all of theirs are bounded closely."""
        for _, sharding in shardings[:SCOUTED_SHARDINGS]:
            figures, arrangements = self.figures(sharding), self.arrangements(sharding)
            order = np.argsort(figures.loosest_s(arrangements), kind="stable")[:SCOUTED_ARRANGEMENTS]
            some = [arrangements[row] for row in order]
            if some:
                table = bounds_of(self.pricing, self.space, figures, some, limits, found.best_s)
                self._scout(table, found, limits)

    def _scout(self, table: Bounds, found: _Found, limits: Sequence[int]) -> None:
        """Looks for a good plan in some meshes, before any choice is counted: the sooner one is known, the less is asked of the others."""
        for choice in table.of_free_cuts(SCOUTED_MESHES, found.best_s):
            if choice in found.scouted:
                continue
            with suppress(TooLong):
                found.scouted[choice] = self.pricing.price(choice, limits, found.best_s)
                found.add_if(found.scouted[choice])

    def _price(self, choice: MixedChoice, limits: Sequence[int], found: _Found) -> None:
        try:
            if choice in found.scouted:
                priced = found.scouted[choice]
            else:
                priced = self.pricing.price(choice, limits, found.best_s)
        except TooLong as slower:
            found.counts.priced += 1
            found.add_slower(choice, slower.seconds)
            return
        found.counts.unfit += priced is None
        found.counts.priced += priced is not None
        found.add_if(priced)

    def _runners_up(self, found: _Found, best: MixedPriced, limits: Sequence[int]) -> list[MixedPriced]:
        """The best of other meshes: those of least bounds are priced a few times, whatever was too slow to be asked for its memory."""
        own = _key(best.choice)
        for key, choices in found.order.by_mesh(own) if found.order is not None else ():
            asked = [found.slower[key][1]] if key in found.slower else []
            for choice in dict.fromkeys((*asked, *choices)):
                try:
                    found.add_if(self.pricing.price(choice, limits, found.seconds_of(key)))
                except TooLong:
                    continue
        others = [priced for key, priced in found.by_mesh.items() if key != own]
        return heapq.nsmallest(KEPT_RUNNERS_UP, others, key=lambda priced: priced.seconds)

    def _result(self, found: _Found, best: MixedPriced, limits: Sequence[int], without: int) -> MixedResult:
        counts = found.counts
        return MixedResult(
            best=best.plan,
            prediction=best.prediction,
            certificate=Certificate(
                graph=self.graph.fingerprint,
                cluster=cluster_hash(self.cluster),
                space=self.space.fingerprint,
                limit_bytes=min(limits),
                cost_s=best.seconds,
                best_bound_s=min(best.seconds, found.least_pruned_s),
                priced=counts.priced,
                unfit=counts.unfit,
                by_bound=counts.by_bound,
                by_memory=counts.by_memory,
                by_rule=counts.by_rule,
                needs=str(self.pricing.savers.beyond(self.rungs[0])),
                without=without,
            ),
            cluster=self.cluster.with_parts(best.choice.arrangement.used),
            shares=tuple(class_shares(self.pricing, best, limits)),
            savers=self.pricing.savers,
            priced=best,
            runners_up=tuple(self._runners_up(found, best, limits)),
            fitting=tuple(found.fitting),
        )


MeshKey = tuple[str, int, int, int, int]


def _key(choice: MixedChoice) -> MeshKey:
    """What makes two plans alike to a reader."""
    return _mesh_of(choice.arrangement)


def _mesh_of(of: Arrangement) -> MeshKey:
    return of.by, of.sharding.tp, of.pp, of.sharding.cp, of.sharding.ep


class _Order:
    """Bounded choices, best first."""

    def __init__(
        self, tables: Sequence[Bounds], firsts: npt.NDArray[np.int64], order: npt.NDArray[np.int64]
    ) -> None:
        self._tables = tables
        self._firsts = firsts
        self._order = order

    def choice(self, index: int) -> MixedChoice:
        table = int(np.searchsorted(self._firsts, index, side="right")) - 1
        return self._tables[table].choice(index - int(self._firsts[table]))

    @cached_property
    def _columns(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """A number of each one's mesh, and how many stages a rank has."""
        rows = [_mesh_of(of) for table in self._tables for of in table.arrangements]
        numbers = {key: number for number, key in enumerate(dict.fromkeys(rows))}
        of_rows = np.array([numbers[key] for key in rows], dtype=np.int64)
        lengths = [(len(t.arrangements), [s.per_rank for _, s in t.columns]) for t in self._tables]
        columns = [np.full(number, len(each)) for number, each in lengths]
        per_rank = [np.tile(each, number) for number, each in lengths]
        return np.repeat(of_rows, np.concatenate(columns))[self._order], np.concatenate(per_rank)[self._order]

    def by_mesh(self, besides: MeshKey) -> Iterator[tuple[MeshKey, list[MixedChoice]]]:
        """The choices of least bounds of each mesh, the mesh of the least one first."""
        meshes, per_rank = self._columns
        known, firsts = np.unique(meshes, return_index=True)
        for mesh in known[np.argsort(firsts)][: KEPT_RUNNERS_UP + 3]:
            of_mesh = meshes == mesh
            chosen = (
                *np.flatnonzero(of_mesh)[:TRIED_OF_MESH],
                *np.flatnonzero(of_mesh & (per_rank == 1))[:TRIED_OF_MESH],
            )
            choices = [self.choice(int(self._order[place])) for place in chosen]
            if _key(choices[0]) != besides:
                yield _key(choices[0]), choices


@dataclass
class _Found:
    """The state of a search."""

    best: MixedPriced | None = None
    counts: Counts = field(default_factory=Counts)
    least_pruned_s: float = math.inf
    fitting: list[MixedPriced] = field(default_factory=list)
    by_mesh: dict[MeshKey, MixedPriced] = field(default_factory=dict)
    slower: dict[MeshKey, tuple[float, MixedChoice]] = field(default_factory=dict)
    order: _Order | None = None
    scouted: dict[MixedChoice, MixedPriced | None] = field(default_factory=dict)

    @property
    def best_s(self) -> float:
        return math.inf if self.best is None else self.best.seconds

    def seconds_of(self, mesh: MeshKey) -> float:
        """The best price so far of a mesh."""
        return self.by_mesh[mesh].seconds if mesh in self.by_mesh else math.inf

    def prune(self, least_s: float, number: int) -> None:
        """Leaves out so many choices, of which none takes less."""
        if number:
            self.counts.by_bound += number
            self.least_pruned_s = min(self.least_pruned_s, least_s)

    def add_if(self, priced: MixedPriced | None) -> None:
        """One that fits."""
        if priced is None:
            return
        self.fitting.append(priced)
        key = _key(priced.choice)
        if priced.seconds < self.seconds_of(key):
            self.by_mesh[key] = priced
        if priced.seconds < self.best_s:
            self.best = priced

    def add_slower(self, choice: MixedChoice, seconds: float) -> None:
        key = _key(choice)
        if seconds < math.inf and (key not in self.slower or seconds < self.slower[key][0]):
            self.slower[key] = seconds, choice
