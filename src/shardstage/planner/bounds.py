"""``bounds_of``: admissible lower bounds of the step time of all choices of a group at once.

A choice's stages are not cut yet: whatever the cut, the slowest of p stages takes at least the mean and at least the heaviest unit, and
so does what waits for ZeRO's gathers (by convexity), the optimizer and the memory of parameters.

    seconds >= m × max(mean stage, heaviest unit) + bubble of mean stages + optimizer of a mean stage + the norm's sum

The bubble's formula asks for means only (``cost.pipeline``). Exposed reductions of gradients count where there is no pipeline, as there a
mean stage is the stage. A mean stage recomputes at least what memory asks for (``trade``). ``Bounds`` are indexed
[mesh, schedule, ZeRO]; in between a row is a pair of a mesh and a ZeRO, and a column a number of stages a rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from shardstage.cluster import DeviceClass
from shardstage.cost.compute import moved_s, optimizer_s
from shardstage.cost.links import LinkCosts, overlap_slowdown
from shardstage.cost.memory import MOMENTS
from shardstage.cost.offload import offloaded_update_s
from shardstage.cost.pipeline import LATE_BUBBLES, SPLITTING
from shardstage.cost.profile import RECOMPUTES, Recompute, UnitCost
from shardstage.layout import Mesh
from shardstage.planner.chain import Chain
from shardstage.planner.even import EvenCuts
from shardstage.planner.lattice import Lattice, MeshTable
from shardstage.planner.space import MAX_STAGES_PER_RANK, Choice, Group, Schedule, Zero
from shardstage.planner.trade import Trade
from shardstage.schedule import SCHEDULES

__all__ = ["Bounds", "bounds_of"]

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Bounds:
    """``seconds`` and ``least_bytes`` (of the fullest rank) are lower bounds; choices that the space does not have are infinite."""

    group: Group
    meshes: tuple[Mesh, ...]
    schedules: tuple[Schedule, ...]
    zeros: tuple[Zero, ...]
    seconds: Array
    least_bytes: Array

    def choice(self, index: int) -> Choice:
        mesh, schedule, zero = np.unravel_index(index, self.seconds.shape)
        return Choice(
            mesh=self.meshes[mesh],
            group=self.group,
            zero=self.zeros[zero],
            schedule=self.schedules[schedule],
        )

    @property
    def num_choices(self) -> int:
        return int(np.isfinite(self.seconds).sum())


def bounds_of(
    lattice: Lattice,
    group: Group,
    chain: Chain,
    costs: LinkCosts,
    settings: BoundSettings,
    even: EvenCuts,
    below_s: float = math.inf,
) -> Bounds | None:
    """Bounds of all choices of a group; None where it has none. ``even`` are the cuts of schedules with several stages a rank.

    Pairs of a mesh and a ZeRO whose mean stages alone take ``below_s``, or more memory than there is, have no other bound than that.
    """
    meshes = lattice.table(group)
    if meshes is None:
        return None
    figures = _Figures(group, chain, costs, settings, meshes, lattice.zeros, even)
    rows = np.nonzero(meshes.has.any(axis=1))
    table = _Table(figures, *rows)
    seconds = np.full(meshes.has.shape, np.inf)
    least_bytes = np.full(meshes.has.shape, np.inf)
    seconds[rows[0], :, rows[1]] = table.mean_s
    least_bytes[rows[0], :, rows[1]] = table.mean_bytes
    is_open = ((table.mean_s < below_s) & (table.mean_bytes <= settings.limit_bytes))[:, 0]
    if is_open.any():
        mesh, zero = rows[0][is_open], rows[1][is_open]
        table = _Table(figures, mesh, zero)
        for name in dict.fromkeys(schedule.name for schedule in lattice.schedules):
            places = np.array([i for i, each in enumerate(lattice.schedules) if each.name == name])
            per_rank = np.array([lattice.schedules[i].per_rank for i in places], dtype=np.float64)
            at = (mesh[:, None], places[None, :], zero[:, None])
            seconds[at], least_bytes[at] = table.of(name, per_rank)
    seconds[~meshes.has] = np.inf
    return Bounds(group, meshes.meshes, lattice.schedules, lattice.zeros, seconds, least_bytes)


@dataclass(frozen=True, kw_only=True)
class BoundSettings:
    """What all choices share: bytes of an element computed with, in the optimizer and of gradients' sums, of a bucket."""

    compute_bytes: int
    master_bytes: int
    gradient_bytes: int
    bucket_bytes: int
    is_offloaded: bool = False
    least_factor: float = 1.0
    limit_bytes: int = 0
    modes: tuple[Recompute, ...] = RECOMPUTES


class _Figures:
    """What all rows of a group share."""

    def __init__(
        self,
        group: Group,
        chain: Chain,
        costs: LinkCosts,
        settings: BoundSettings,
        meshes: MeshTable,
        zeros: Sequence[Zero],
        even: EvenCuts,
    ) -> None:
        self.group = group
        self.chain = chain
        self.device = costs.cluster.device
        self.settings = settings
        self.meshes = meshes
        self.even = even
        self.kinds = _Kinds(chain.kinds)
        self.trade = Trade(chain.kinds, even.whole, settings.modes)
        self.levels = np.array([zero.level for zero in zeros])
        self.are_near = np.array([zero.num_ranks is not None for zero in zeros])


class _Table:
    """One group's figures as arrays [row, 1] or [row, stages a rank]: row k is the k-th of ``mesh`` with the k-th of ``zero``."""

    def __init__(self, figures: _Figures, mesh: Any, zero: Any) -> None:
        self.settings, self.chain, self.even = figures.settings, figures.chain, figures.even
        self.kinds, self._trade = figures.kinds, figures.trade
        self._mesh, self._talk = mesh, figures.meshes.talk
        self._ranks: dict[str, _EvenRanks] = {}
        self._slowdown = overlap_slowdown(figures.device)
        self._alone_ratio = figures.device.alone_ratio
        chain, talk, ep = self.chain, self._talk, figures.group.ep
        self.p = self._of_meshes(figures.meshes.pp)
        self.m = np.ceil(self._of_meshes(figures.meshes.share) / figures.group.microbatch)
        self._level = figures.levels[zero][:, None]
        self._is_near = figures.are_near[zero][:, None]
        self._is_gathered, self._is_scattered = self._level == 3, self._level >= 2
        whole = self._of_meshes(talk.replicas)
        self._has_copies = whole > 1
        self._gather = self._of_shards(talk.gather, talk.near_gather)
        self._scatter = self._of_shards(talk.scatter, talk.near_scatter)
        self._copies = talk.copies[mesh] * (self._has_copies & self._is_near)
        self._near_ranks = self._of_meshes(talk.near_ranks)
        self._shards = np.where(self._level == 0, 1.0, np.where(self._is_near, self._near_ranks, whole))
        self._expert_shards = np.maximum(1, np.floor(self._shards / ep))
        n, p = chain.num_units, self.p
        forward, backward = chain.forward_s[n], chain.backward_s[n]
        elements = chain.own[n] + sum(chain.profile.shared_elements.values())
        part = self._part_elements(elements, chain.experts[n]) / p
        self._plain_f, self._plain_b = forward / p, backward / p
        self._gathered, self._scattered = self._zero_talk_s(chain.own[n], self._gathers(self.even.whole))
        self._accumulation = self._accumulation_s(elements / p, part, figures.device)
        self.forward, self.backward = self.stage_s(0.0)
        travel = 2 * (p - 1) * _seconds_of(talk.transfer[mesh], min(chain.received[1:], default=0), 1.0)
        after = self._after_s(elements / p, backward + self._accumulation)
        self.after = after + self._update_s(part, figures.device) + self._of_meshes(talk.norm_s) + travel
        self.state_bytes = self._state_bytes(elements / p, part)

    def _of_meshes(self, values: Any) -> Any:
        """Figures of meshes, for each row."""
        return values[self._mesh][:, None]

    @property
    def mean_s(self) -> Any:
        """Whatever the schedule: all microbatches on the mean stage, the least bubble of all schedules, and what comes after."""
        mean = self.forward + self.backward
        slowest = np.maximum(mean, self.chain.slowest_unit_s)
        bubble = (self.p - 1) * np.minimum(mean / MAX_STAGES_PER_RANK, self._plain_f / 2)
        return self._seconds(self.m * slowest + bubble, mean)

    @property
    def mean_bytes(self) -> Any:
        """Whatever the schedule: the state of a mean rank, and a microbatch."""
        return self.state_bytes + self._trade.least_saved / self.p

    def _seconds(self, pipeline_s: Any, mean: Any) -> Any:
        """Of a step; on shared cores all ranks' work, or the pipeline as quick as if each rank were alone."""
        if self._alone_ratio > 1:
            pipeline_s = np.maximum(pipeline_s / self._alone_ratio, self.m * mean)
        return self.settings.least_factor * (pipeline_s + self.after)

    def of(self, name: str, per_rank: Array) -> tuple[Any, Any]:
        """Seconds and bytes of a schedule with each of these numbers of stages a rank."""
        if per_rank.max() == 1:
            return self._of_free_cuts(name)
        return self._of_even_cuts(name, per_rank[None, :])

    def _part_elements(self, elements: Any, experts: Any) -> Any:
        """What a rank owns under ZeRO of elements of which so many are of experts."""
        return (elements - experts) / self._shards + experts / self._expert_shards

    def stage_s(self, again: Any, first: tuple[Any, Any] = (0.0, 0.0)) -> tuple[Any, Any]:
        """Forward and backward of a mean rank that recomputes for ``again`` seconds and waits for ``first`` gathers and reductions."""
        f, b = self._plain_f, self._plain_b + again
        waits = self._exposed_s(self._gathered, f, first[0]), self._exposed_s(self._scattered, b, first[1])
        return f + waits[0], b + waits[1] + self._accumulation

    def first_s(self, own: Any, calls: Any) -> tuple[Any, Any]:
        """ZeRO-2/3's gathers and reductions of the first units of a rank's stages, beside which nothing runs."""
        forward_s, scatter_s = self._gather_and_scatter_s(own, calls)
        return np.where(self._is_scattered, forward_s, 0.0), np.where(self._is_scattered, scatter_s, 0.0)

    def _zero_talk_s(self, own: float, calls: float) -> tuple[Any, Any]:
        """What ZeRO-2/3 gathers and reduces on a mean stage for each microbatch, forward and backward."""
        gather, scatter = self._gather_and_scatter_s(own / self.p, calls / self.p)
        again = np.where(self._is_gathered, gather, 0.0)
        return np.where(self._is_scattered, gather, 0.0), np.where(self._is_scattered, again + scatter, 0.0)

    def _gather_and_scatter_s(self, own: Any, calls: Any) -> tuple[Any, Any]:
        gather_s = _seconds_of(self._gather, own * self.settings.compute_bytes, calls)
        return gather_s, self._scatter_s(own * self.settings.gradient_bytes, calls)

    def _gathers(self, numbers: Array) -> float:
        """How many of so many units of each kind have parameters of their own."""
        return float(numbers @ (self.kinds.of("own") > 0))

    def _exposed_s(self, talk: Any, compute: Any, first: Any = 0.0) -> Any:
        """``links.exposed_s``: convex, so a mean stage's is at most the stages' mean."""
        return np.maximum(talk - compute, first + self._slowdown * (talk - first))

    def _accumulation_s(self, own: Any, part: Any, device: DeviceClass) -> Any:
        """Adding a microbatch's gradients to their sums, where there is more than one."""
        added = np.where(self._is_scattered, part, own) * np.where(self.m > 1, 1.0, 0.0)
        return added * moved_s(self.settings.compute_bytes + 2.0 * self.settings.gradient_bytes, device)

    def _update_s(self, part: Any, device: DeviceClass) -> Any:
        """The optimizer of a mean stage; parameters come up from the host at least as narrow as they are stored."""
        c, g, w = self.settings.compute_bytes, self.settings.gradient_bytes, self.settings.master_bytes
        if self.settings.is_offloaded:
            return part * offloaded_update_s(1, device, down_bytes=g, up_bytes=min(c, g), element_bytes=w)
        return part * optimizer_s(1, w, 0, device)

    def _after_s(self, own: Any, backward: Any) -> Any:
        """After the pipeline: ZeRO-1's new parameters, and without a pipeline the reduction that the last backward does not hide."""
        settings, level, talk = self.settings, self._level, self._talk
        c, g = settings.compute_bytes, settings.gradient_bytes
        num_buckets = np.maximum(1.0, np.floor(own * c / settings.bucket_bytes))
        gathered = _seconds_of(self._gather, own * c, num_buckets)
        reduced = self._has_copies * _seconds_of(talk.reduce[self._mesh], own * g, num_buckets)
        summed = np.where(level == 0, reduced, self._scatter_s(own * g, num_buckets))
        exposed = np.where(level < 2, self._exposed_s(summed, backward), 0.0)
        return np.where(level == 1, gathered, 0.0) + np.where(self.p == 1, exposed, 0.0)

    def _state_bytes(self, own: Any, part: Any) -> Any:
        """Parameters, gradients and optimizer of a stage."""
        settings, level = self.settings, self._level
        c, g, w = settings.compute_bytes, settings.gradient_bytes, settings.master_bytes
        whole = np.where(level == 3, 0.0, own)
        gradients = np.where(level >= 2, part * g, own * g + np.where(level == 1, part * g, 0.0))
        if settings.is_offloaded:
            return whole * c + gradients
        master = np.where((level >= 2) | (c != w), part * w, 0.0)
        return whole * c + gradients + master + MOMENTS * part * w

    def _of_shards(self, far: Array, near: Array) -> Any:
        """What a collective over the ranks that ZeRO cuts over costs, [row, 2]: nothing where there is but one."""
        return np.where(self._is_near, near[self._mesh], far[self._mesh]) * self._has_copies

    def _scatter_s(self, num_bytes: Any, calls: Any) -> Any:
        """Summing and cutting gradients, and summing the parts with those of the copies."""
        scatter_s = _seconds_of(self._scatter, num_bytes, calls)
        return scatter_s + _seconds_of(self._copies, num_bytes / self._near_ranks, calls)

    def _of_free_cuts(self, name: str) -> tuple[Any, Any]:
        """One stage a rank, of which each may recompute otherwise; ``held`` microbatches at least are in flight on all of them."""
        m, p = self.m, self.p
        held = {"gpipe": m, "zb-h1": np.minimum(m, p)}.get(name, 1.0)
        again = self._trade.again_s(p * (self.settings.limit_bytes - self.state_bytes) / held) / p
        mean = sum(self.stage_s(again))
        fullest_s, fullest_bytes = self._of_most_layers(held)
        slowest = np.maximum(mean, np.maximum(fullest_s, self.chain.slowest_unit_s))
        if name in ("1f1b", "gpipe"):
            total = (m - 1) * slowest + p * mean
        else:
            total = m * slowest + self._bubble_s(name, 1.0, self.forward, self.backward)
        least_bytes = np.maximum(self.state_bytes + held * self._trade.least_saved / p, fullest_bytes)
        return self._seconds(total, mean), least_bytes

    def _of_most_layers(self, held: Any) -> tuple[Any, Any]:
        """Of the stage that has most units of the kind that takes longest in all: at least their even share, rounded up."""
        chain, whole = self.chain, self.even.whole
        kind = int(np.argmax(whole * self.kinds.of("both_s")))
        unit = chain.kinds[kind]
        number = np.ceil(whole[kind] / self.p)
        own, experts = number * unit.own_elements, number * unit.expert_elements
        state = self.rank_state_bytes(own, experts, unit.own_elements)
        return self._first_that_fits(
            lambda mode: number * (self.kinds.of("both_s")[kind] + unit.kept[mode].recompute_s),
            lambda mode: (
                state
                + held * number * unit.kept[mode].saved_bytes
                + unit.kept[mode].extra_bytes
                + unit.transient_bytes
            ),
        )

    def _of_even_cuts(self, name: str, v: Any) -> tuple[Any, Any]:
        """Several stages a rank, which recompute alike: by the first mode that does not surely exceed the memory."""
        m, p, ranks = self.m, self.p, self._ranks_of(name, v)

        def seconds(mode: Recompute) -> Any:
            forward, backward = self.stage_s(self.chain.recompute_s[mode][-1] / p, ranks.mean_first_s)
            heaviest = ranks.slowest_s(mode) + ranks.least_first_s
            slowest = np.maximum(forward + backward, np.maximum(heaviest, self.chain.slowest_unit_s))
            bubble = self._bubble_s(name, v, forward / v, backward / v)
            return self._seconds(m * slowest + bubble, forward + backward)

        return self._first_that_fits(seconds, ranks.num_bytes)

    def _ranks_of(self, name: str, v: Any) -> _EvenRanks:
        """What even cuts make of ranks: the same under both schedules that lay stages in a V."""
        places = SCHEDULES[name].places
        if places not in self._ranks:
            self._ranks[places] = _EvenRanks(self, name, v)
        return self._ranks[places]

    def _first_that_fits(
        self, seconds: Callable[[Recompute], Any], num_bytes: Callable[[Recompute], Any]
    ) -> tuple[Any, Any]:
        """Seconds by the first mode that does not surely exceed the limit, or the last one, and the least bytes of all modes."""
        first, *others = self.settings.modes
        found_s, least_bytes = seconds(first), num_bytes(first)
        for mode in others:
            is_open = least_bytes > self.settings.limit_bytes
            if is_open.any():
                found_s = np.where(is_open, seconds(mode), found_s)
            least_bytes = np.minimum(least_bytes, num_bytes(mode))
        return found_s, least_bytes

    def rank_state_bytes(self, own: Any, experts: Any, largest_unit: Any) -> Any:
        """Of a rank with so many elements, and under ZeRO-2/3 the gradients of its largest unit while they are reduced."""
        reduced = np.where(self._is_scattered, largest_unit * self.settings.gradient_bytes, 0.0)
        return self._state_bytes(own, self._part_elements(own, experts)) + reduced

    def held(self, name: str, v: Any) -> Any:
        """Pairs (stage, microbatch) that one of the ranks holds at once: the first in rounds, the last in a V (``schedule.held``)."""
        m, p = self.m, self.p
        if name in SPLITTING:
            return 2 * np.minimum(m, p) * np.ones_like(v)
        if name == "looped-bfs":
            return m * v
        largest_round = np.ceil(m / np.maximum(1, np.floor(m / p)))
        return np.minimum(m * v, 2 * (p - 1) + (v - 1) * largest_round + 1)

    def _bubble_s(self, name: str, v: Any, forward: Any, backward: Any) -> Any:
        """``cost.pipeline.bubble_s`` of mean stages, ``v`` a rank."""
        m, p = self.m, self.p
        few = np.maximum(0.0, p - m)
        if name in SPLITTING:
            late = LATE_BUBBLES.get(name, 0.0) * np.minimum(p, np.maximum(0.0, 2 * p - m)) / p
            return (p - 1) * forward * (1 + late) + few * v * backward / 2
        return (p - 1 + few * (v - 1)) * (forward + backward)


def _seconds_of(cost: Array, num_bytes: Any, calls: Any) -> Any:
    """Collectives from seconds before the first byte and for each byte, [row, 2]."""
    return calls * cost[:, :1] + num_bytes * cost[:, 1:]


class _EvenRanks:
    """Ranks of even cuts, [row, stages a rank]; what was asked once is kept."""

    def __init__(self, table: _Table, name: str, v: Any) -> None:
        self._kinds = table.kinds
        self._ranks = ranks = table.even.ranks(name)
        p, v_ = np.broadcast_arrays(table.p.astype(np.int64), v.astype(np.int64))
        self._rows = ranks.place[p, np.minimum(v_, ranks.place.shape[1] - 1)]
        self._held = table.held(name, v)
        own, experts = (self._at(ranks.of_fullest(self._kinds.of(each))) for each in ("own", "experts"))
        largest = self._at(ranks.most_of_fullest(self._kinds.of("own")))
        self._state = table.rank_state_bytes(own, experts, largest)
        elements, calls = self._kinds.of("own"), (self._kinds.of("own") > 0).astype(np.float64)
        self.mean_first_s = table.first_s(
            self._at(ranks.mean_first(elements)), self._at(ranks.mean_first(calls))
        )
        self.least_first_s = sum(
            table.first_s(self._at(ranks.least_first(elements)), self._at(ranks.least_first(calls)))
        )
        self._slowest: dict[Recompute, Any] = {}
        self._bytes: dict[Recompute, Any] = {}

    def _at(self, values: Array) -> Any:
        """Of the row of the table that each pair of ranks and stages a rank has."""
        return values[self._rows]

    def slowest_s(self, mode: Recompute) -> Any:
        """Seconds of the heaviest rank for one microbatch, without what ZeRO waits for."""
        if mode not in self._slowest:
            each = self._kinds.of("both_s") + self._kinds.of("again_s", mode)
            self._slowest[mode] = self._at(self._ranks.slowest(each))
        return self._slowest[mode]

    def num_bytes(self, mode: Recompute) -> Any:
        """What the fullest rank holds at least."""
        if mode not in self._bytes:
            saved = self._held * self._at(self._ranks.least_of_fullest(self._kinds.of("saved", mode)))
            passing = self._at(self._ranks.most_of_fullest(self._kinds.of("passing", mode)))
            self._bytes[mode] = self._state + saved + passing
        return self._bytes[mode]


class _Kinds:
    """Figures of each kind of unit of a chain."""

    def __init__(self, units: Sequence[UnitCost]) -> None:
        self._units = units
        self._known: dict[tuple[str, Recompute], Array] = {}

    def of(self, figure: str, mode: Recompute = "none") -> Array:
        if (figure, mode) not in self._known:
            read = _FIGURES[figure]
            self._known[figure, mode] = np.array([read(unit, mode) for unit in self._units], dtype=np.float64)
        return self._known[figure, mode]


_FIGURES: Final[Mapping[str, Callable[[UnitCost, Recompute], float]]] = MappingProxyType(
    {
        "both_s": lambda unit, _: (
            unit.forward_s + unit.backward_s + unit.talk_s(forward=True) + unit.talk_s(forward=False)
        ),
        "again_s": lambda unit, mode: unit.kept[mode].recompute_s,
        "saved": lambda unit, mode: unit.kept[mode].saved_bytes,
        "passing": lambda unit, mode: unit.kept[mode].extra_bytes + unit.transient_bytes,
        "own": lambda unit, _: unit.own_elements,
        "experts": lambda unit, _: unit.expert_elements,
    }
)
