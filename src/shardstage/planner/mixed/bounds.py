"""``bounds_of``: of all choices of one sharding at once, seconds that a step takes at least, and which cannot fit.

k_i stages or ranks of a pipeline on class i, τ the slowest one's seconds for a microbatch; c_ui seconds of unit u on class i, r_ua more
where it recomputes in the way a, b_ua bytes that it then keeps, L_i the limit. For any prices y, λ >= 0 (weak duality of the linear
program that deals units out by fractions):

    τ Σ k_i y_i  >=  Σ_u min_ia [ y_i (c_ui + r_ua) + λ_i b_ua ]  -  Σ λ_i k_i L_i

y_i is the speed of class i; λ_i is zero, or such that a way of recomputation costs what its memory is worth. No time at all fits where
Σ_u min_ia b_ua > Σ k_i L_i. And layers are whole: Σ k_i ⌊τ / c_i⌋ >= their number.

step >= pipeline (its formula at τ and at Σ_u min_i c_ui) + transfers + optimizer + what of the first reduction nothing hides
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from shardstage.cluster import CollectiveKind, LinearCost
from shardstage.cost import StepSetup
from shardstage.cost.compute import moved_s, optimizer_s
from shardstage.cost.links import overlap_slowdown
from shardstage.cost.memory import MOMENTS
from shardstage.cost.profile import RECOMPUTES, Recompute
from shardstage.layout import Mesh
from shardstage.planner.mixed.even import uneven_pipeline_s
from shardstage.planner.mixed.figures import MixedFigures
from shardstage.planner.mixed.pricing import MixedPricing
from shardstage.planner.mixed.space import Arrangement, MixedChoice, MixedSpace, Sharding
from shardstage.planner.space import Schedule, Zero

__all__ = ["Bounds", "bounds_of"]

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

HELD_AS: Final = MappingProxyType({"zb-h1": "zb-h1", "zb-v": "v", "dualpipe-v": "v"})
"""What a rank holds at least under a schedule: as under ZB-H1, in a V, or as under 1F1B, which none of the others holds less than."""

ROUNDED_UP: Final = 2.0
"""Elements by which a unit's part under ZeRO exceeds a share: one of an expert and one of what is none."""
INTEGER_STEPS: Final = 12
"""So often is the time of whole layers raised to the next at which a class takes one more."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Of each arrangement, ZeRO and schedule [row, column]: the least seconds, infinite where that is no choice of the space; whether it
    cannot fit."""

    arrangements: Sequence[Arrangement]
    columns: Sequence[tuple[Zero, Schedule]]
    seconds: Array
    is_large: npt.NDArray[np.bool_]
    num_by_rule: int

    def choice(self, index: int) -> MixedChoice:
        """By its flat index."""
        row, column = divmod(index, len(self.columns))
        return MixedChoice(self.arrangements[row], *self.columns[column])

    def of_free_cuts(self, number: int, below_s: float) -> Iterator[MixedChoice]:
        """The first choices of so many meshes with one stage a rank, whose bounds know more of memory, that may fit and take less."""
        is_free = np.array([schedule.per_rank == 1 for _, schedule in self.columns], dtype=bool)
        if not is_free.any():
            return
        seconds = np.where(is_free & ~self.is_large, self.seconds, np.inf)
        column = seconds.argmin(axis=1)
        rows = seconds.min(axis=1)
        known: set[tuple[str, int]] = set()
        for row in np.argsort(rows, kind="stable"):
            of = self.arrangements[row]
            if rows[row] >= below_s or len(known) == number:
                return
            if (of.by, of.pp) not in known:
                known.add((of.by, of.pp))
                yield self.choice(int(row * len(self.columns) + column[row]))


class _Lanes(NamedTuple):
    """One lane of each row: ``k`` [class, row] ranks of a pipeline on each class, ``size`` [class, row] places of its sizes in the table;
    the places in the pipeline of the ``first`` and ``last`` of these ranks [class, row], and its microbatches."""

    k: Array
    size: npt.NDArray[np.int64]
    first: Array
    last: Array
    m: Array

    def held(self, how: str) -> Array:
        """[class, row]: microbatches that each of these ranks holds at least on each of its stages at a moment."""
        p = self.k.sum(axis=0)
        each: Array = {
            "1f1b": p - self.last,
            "zb-h1": np.broadcast_to(p, self.last.shape),
            "v": self.first + 1,
        }[how]
        found: Array = np.minimum(self.m, each)
        return found


def bounds_of(
    pricing: MixedPricing,
    space: MixedSpace,
    figures: MixedFigures,
    arrangements: Sequence[Arrangement],
    limits: Sequence[int],
    below_s: float = math.inf,
) -> Bounds:
    """Of all choices with these arrangements, which are of one sharding; close ones of those that may take less than ``below_s``."""
    rows = _Rows(pricing, figures, arrangements, limits)
    zeros = sorted({zero for of in arrangements for zero in space.zeros_of(of)}, key=str)
    columns = [(zero, schedule) for zero in zeros for schedule in space.declared.schedules]
    shape = (len(arrangements), len(columns))
    seconds, is_large = np.full(shape, np.inf), np.zeros(shape, dtype=bool)
    is_offered, is_dominated = _offered(space, arrangements, columns)
    is_open = is_offered & ~is_dominated
    for zero in zeros:
        of_zero = rows.at(zero)
        for column, (its_zero, schedule) in enumerate(columns):
            if its_zero == zero and is_open[:, column].any():
                seconds[:, column], is_large[:, column] = of_zero.of(schedule, below_s)
    return Bounds(
        arrangements=arrangements,
        columns=columns,
        seconds=np.where(is_open, seconds, np.inf),
        is_large=is_large & is_open,
        num_by_rule=int((is_offered & is_dominated).sum()),
    )


def _offered(
    space: MixedSpace, arrangements: Sequence[Arrangement], columns: Sequence[tuple[Zero, Schedule]]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Which columns each row may take, and which of these another one equals."""
    known: dict[tuple[int, int], Any] = {}
    dominated = space.declared.dominated
    rows = []
    for of in arrangements:
        key = (of.pp, of.dp)
        if key not in known:
            zeros, schedules = {*space.zeros_of(of)}, {*space.schedules_of(of)}
            known[key] = [zero in zeros and schedule in schedules for zero, schedule in columns]
        rows.append(known[key])
    is_offered = np.array(rows, dtype=bool).reshape(len(arrangements), len(columns))
    is_dominated = np.array([schedule in dominated for _, schedule in columns], dtype=bool)
    return is_offered, np.broadcast_to(is_dominated, is_offered.shape)


class _Rows:
    """Arrangements as arrays; what talking over each mesh costs is found once for each."""

    def __init__(
        self,
        pricing: MixedPricing,
        figures: MixedFigures,
        arrangements: Sequence[Arrangement],
        limits: Sequence[int],
    ) -> None:
        self.pricing = pricing
        self.figures = figures
        self.limits = np.array(limits, dtype=np.float64)
        self.setup = pricing.setup(MixedChoice(arrangements[0], Zero(0), Schedule("1f1b", 1)))
        self.p = np.array([of.pp for of in arrangements], dtype=np.float64)
        self.m = np.array([of.num_microbatches for of in arrangements], dtype=np.float64)
        self.replicas = np.array([of.mesh.num_replicas for of in arrangements], dtype=np.float64)
        self.talk = _Talk(pricing, [of.mesh for of in arrangements])
        self.kinds = [
            (np.array([row for row, of in enumerate(arrangements) if of.by == by]), by)
            for by in ("stages", "shares")
        ]
        self._arrangements = arrangements

    def at(self, zero: Zero) -> _OfZero:
        return _OfZero(self, zero)

    def lanes(self) -> Iterator[tuple[npt.NDArray[np.int64], tuple[int, ...], _Lanes]]:
        """Rows with one of their lanes: the classes that it lies on, and how."""
        places = {int(size): place for place, size in enumerate(self.figures.sizes)}
        num_classes = len(self.limits)
        for rows, by in self.kinds:
            if not len(rows):
                continue
            own = [self._arrangements[row] for row in rows]
            size = np.array([[places[size] for size in of.sizes] for of in own]).T
            if by == "stages":
                k = np.array([of.ways for of in own], dtype=np.float64).T
                stop = np.cumsum(k, axis=0)
                yield rows, tuple(range(num_classes)), _Lanes(k, size, stop - k, stop - 1, self.m[rows])
                continue
            k = self.p[rows][None]
            for number in range(num_classes):
                of = size[number : number + 1]
                yield rows, (number,), _Lanes(k, of, np.zeros_like(k), k - 1, self.m[rows])


class _Talk:
    """Seconds before the first byte and for each byte, [row, 2], by kind of collective over replicas; and between stages."""

    def __init__(self, pricing: MixedPricing, meshes: Sequence[Mesh]) -> None:
        self._meshes = {mesh: number for number, mesh in enumerate(dict.fromkeys(meshes))}
        self._which = np.array([self._meshes[mesh] for mesh in meshes])
        self._costs = pricing.costs.link_costs
        self.reduce = self.over_replicas("all_reduce", None)
        self.transfer = self._each(lambda mesh: self._costs.cost("p2p", min(2, mesh.pp), mesh.stride("pp")))
        self.norm_s = self._each(lambda mesh: self._costs.cost("all_reduce", mesh.world_size, 1))[:, 0]

    def over_replicas(self, kind: CollectiveKind, num_ranks: int | None) -> Array:
        """Over all of them, or over so many neighbours."""
        return self._each(
            lambda mesh: self._costs.cost(
                kind,
                min(num_ranks or mesh.num_replicas, mesh.num_replicas),
                mesh.stride("cp" if mesh.cp > 1 else "dp"),
            )
        )

    def over_experts(self, kind: CollectiveKind, of: Sharding, shards: Array) -> Array:
        """[row]: seconds a byte among the ranks that ZeRO cuts the same experts over, so many in each row."""
        stride = of.ep * (1 if of.has_whole_experts else of.tp)
        known, which = np.unique(shards.astype(np.int64), return_inverse=True)
        costs = [self._costs.cost(kind, number, stride) for number in known.tolist()]
        found: Array = np.array([1 / cost.bytes_per_s for cost in costs])[which]
        return found

    def _each(self, cost: Callable[[Mesh], LinearCost]) -> Array:
        found = [cost(mesh) for mesh in self._meshes]
        table: Array = np.array([(each.latency_s, 1 / each.bytes_per_s) for each in found])[self._which]
        return table


class _OfZero:
    """Bounds of all rows under one ZeRO level."""

    def __init__(self, rows: _Rows, zero: Zero) -> None:
        self._rows = rows
        self._level = np.where(rows.replicas > 1, zero.level, 0)
        setup, of = rows.setup, rows.figures.sharding
        self._shards = np.where(self._level > 0, zero.num_ranks or rows.replicas, 1.0)
        holders = np.where(self._level > 0, of.tp if of.has_whole_experts else 1, 1.0)
        self._expert_shards = np.where(self._level > 0, np.maximum(1.0, self._shards * holders // of.ep), 1.0)
        self._gather = rows.talk.over_replicas("all_gather", zero.num_ranks)
        self._scatter = rows.talk.over_replicas("reduce_scatter", zero.num_ranks)
        self._lanes = [(own, on, lanes, self._costs(own, on, lanes)) for own, on, lanes in rows.lanes()]
        self._known: dict[tuple[int, str], _Held] = {}
        self._state = _state_bytes(setup, self._level, self._shards)
        self._expert_state = _state_bytes(setup, self._level, self._expert_shards)

    def of(self, schedule: Schedule, below_s: float) -> tuple[Array, Mask]:
        """[row]: least seconds, and whether a choice cannot fit; what takes ``below_s`` whatever memory there is gets no closer bound."""
        seconds, is_large = np.zeros(len(self._rows.p)), np.zeros(len(self._rows.p), dtype=bool)
        for place, (own, _, lanes, costs) in enumerate(self._lanes):
            key = place, HELD_AS.get(schedule.name, "1f1b")
            if key not in self._known:
                plain = _plain_s(costs, self._rows.figures.number, lanes.k)
                self._known[key] = _Held(
                    plain, np.zeros(len(own), dtype=bool), np.zeros(len(own), dtype=bool)
                )
            held = self._known[key]
            is_open = (self._of_lane(schedule, own, costs, held.slowest) < below_s) & ~held.is_known
            if is_open.any():
                self._add_held(*key, np.flatnonzero(is_open))
            found = self._of_lane(schedule, own, costs, held.slowest)
            seconds[own] = np.maximum(seconds[own], found)
            is_large[own] |= held.is_large
        return seconds, is_large

    def _add_held(self, place: int, how: str, at: npt.NDArray[np.int64]) -> None:
        """Finds out about some rows of a lane what memory asks of them."""
        known, rows, f = self._known[place, how], self._rows, self._rows.figures
        own, on, lanes, costs = self._lanes[place]
        k, limits, of = lanes.k[:, at], rows.limits[list(on)], own[at]
        state = self._state[of] * f.replicated[:, None] + self._expert_state[of] * f.experts[:, None]
        held = lanes.held(how)[:, at]
        kept = [held[:, None] * saved[..., at] + state[None] for saved in costs.saved]
        room = self._room(of, k, lanes.size[0, at], limits)
        least_bytes = _sums(f.number, np.minimum.reduce([b.min(axis=0) for b in kept]))
        is_large = least_bytes > (k * room.each).sum(axis=0) + room.more
        known.is_large[at], known.is_known[at] = is_large, True
        fits = np.flatnonzero(~is_large)
        if len(fits):
            left = _Room(room.each[:, fits], room.more[fits])
            found = _slowest_s(costs, at[fits], f.number, k[:, fits], [b[..., fits] for b in kept], left)
            known.slowest[at[fits]] = np.maximum(known.slowest[at[fits]], found)

    def _room(self, of: Any, k: Array, size: Any, limits: Array) -> _Room:
        """What is left for units to keep, beside the largest that passes and, under ZeRO-2/3, what is gathered of it."""
        f, setup, level, p = self._rows.figures, self._rows.setup, self._level[of], k.sum(axis=0)
        c, g, most = setup.compute_bytes, setup.gradient_bytes, int(f.number.argmax())
        gathered = np.where(level >= 2, c + g, 0) + np.where(level >= 3, c, 0)
        beside = f.passing[:, size] + f.own[:, None] * gathered  # [kind, row]
        of_rank = np.where(p == 1, beside.max(axis=0), beside[most])
        num_without = np.minimum(_sums(f.number, 1.0 * (beside < beside[most])), p - 1)
        return _Room(limits[:, None] - of_rank, num_without * of_rank)

    def _costs(self, own: Any, on: tuple[int, ...], lanes: _Lanes) -> _Costs:
        """Of each lane's units, [class, kind, row]."""
        f, rows, setup = self._rows.figures, self._rows, self._rows.setup
        numbers = np.array(on)[:, None]

        def sized(values: Array) -> Array:
            found: Array = values[numbers, :, lanes.size].transpose(0, 2, 1)
            return found

        reference = rows.pricing.costs.reference(on).device
        element_s = moved_s(setup.accumulation_bytes, reference)
        level, m = self._level[own], rows.m[own]
        parts = self._part_elements(own, f.replicated[:, None], f.experts[:, None])
        added_s = element_s * (m > 1) * np.where(level >= 2, parts, f.own[:, None])
        most_added_s = added_s + element_s * (m > 1) * (f.shared[:, None] + ROUNDED_UP)
        talk_s = self._talk_s(own, level)
        forward, backward = sized(f.forward_s), sized(f.backward_s)
        extra = added_s + overlap_slowdown(reference) * talk_s
        both = forward + backward + extra
        return _Costs(
            all_forward=_sums(f.number, forward.min(axis=0)),
            all_backward=_sums(f.number, backward.min(axis=0) + added_s),
            all_weight=_sums(f.number, sized(f.weight_s).max(axis=0) + most_added_s),
            all_both=_sums(f.number, both.min(axis=0)),
            both=both,
            talk=talk_s,
            again=[sized(f.again_s[mode]) for mode in self._modes],
            saved=[f.saved[mode][:, lanes.size].transpose(1, 0, 2) for mode in self._modes],
            ratio=reference.alone_ratio,
            beside=self._beside_s(own, on, lanes),
        )

    @property
    def _modes(self) -> tuple[Recompute, ...]:
        asked = self._rows.pricing.asked
        return RECOMPUTES if asked is None or asked not in RECOMPUTES else (asked,)

    def _talk_s(self, own: Any, level: Array) -> Array:
        """[kind, row]: seconds of ZeRO-2/3's collectives for a microbatch."""
        f, setup, shards = self._rows.figures, self._rows.setup, self._expert_shards[own]
        calls, has_experts = (f.replicated > 0)[:, None], bool(f.experts.any())

        def each(kind: CollectiveKind, table: Array, element_bytes: float) -> Array:
            found: Array = calls * table[own, 0] + f.replicated[:, None] * element_bytes * table[own, 1]
            if has_experts:
                byte_s = self._rows.talk.over_experts(kind, f.sharding, shards)
                found = found + f.experts[:, None] * element_bytes * byte_s
            return found

        if not level.max(initial=0) >= 2:
            return np.zeros((len(f.own), len(level)))
        gathers = np.where(level >= 3, 2.0, 0.0) * each("all_gather", self._gather, setup.compute_bytes)
        scatters = each("reduce_scatter", self._scatter, setup.wire_bytes)
        return np.where(level >= 2, gathers + scatters, 0.0)

    def _part_elements(self, own: Any, replicated: Any, experts: Any) -> Any:
        """What ranks own under ZeRO of so many elements."""
        return replicated / self._shards[own] + experts / self._expert_shards[own]

    def _beside_s(self, own: Any, on: tuple[int, ...], lanes: _Lanes) -> Array:
        """[row]: transfers, the optimizer on the mean rank, new parameters, the norm's sum, and what of reductions nothing hides."""
        rows, f, setup, level = self._rows, self._rows.figures, self._rows.setup, self._level[own]
        talk, p = rows.talk, rows.p[own]
        reference = rows.pricing.costs.reference(on).device
        elements, first = f.number @ f.replicated, f.replicated[f.first]
        part = self._part_elements(own, elements, f.number @ f.experts) / p
        received = f.received[lanes.size[0]]
        transfer = (talk.transfer[own, 0] + received * talk.transfer[own, 1]) * (reference.alone_ratio == 1)
        update = 0.0 if setup.is_offloaded else part * optimizer_s(1, setup.master_bytes, 0, reference)
        gather = self._gather[own, 0] + elements / p * setup.compute_bytes * self._gather[own, 1]
        sums = np.where((level == 1)[:, None], self._scatter[own], talk.reduce[own])
        least = np.where(p == 1, elements, first) * setup.wire_bytes * sums[:, 1]
        exposed = overlap_slowdown(reference) * least * ((level < 2) & (rows.replicas[own] > 1))
        gather *= (level == 1) | ((level == 2) & (p == 1))  # a pipeline may hide it under level 2
        found: Array = 2 * (p - 1) * transfer + update + gather + exposed + talk.norm_s[own]
        return found

    def _of_lane(self, schedule: Schedule, own: Any, costs: _Costs, slowest: Array) -> Array:
        """[row]: least seconds of a step."""
        rows = self._rows
        pipeline = _pipeline_s(schedule, slowest, costs, rows.p[own], rows.m[own])
        found: Array = rows.pricing.least_factor * (pipeline / costs.ratio + costs.beside)
        return found


class _Room(NamedTuple):
    """Bytes for what units keep: of a rank of each class [class, row], and how much more of all where some ranks have small units only."""

    each: Array
    more: Array


class _Held(NamedTuple):
    """Of a lane's rows: seconds of the slowest rank, and whether it cannot fit; with what memory asks for where that ``is_known``."""

    slowest: Array
    is_large: Mask
    is_known: Mask


class _Costs(NamedTuple):
    """Of a lane's units [class, kind, row]: seconds of both directions with what sums and ZeRO add at least; ``talk`` [kind, row] of ZeRO;
    by mode of recomputation its seconds, and bytes kept. ``all_*`` [row] sum units, each on its quickest class, W on the slowest."""

    all_forward: Array
    all_backward: Array
    all_weight: Array
    all_both: Array
    both: Array
    talk: Array
    again: Sequence[Array]
    saved: Sequence[Array]
    ratio: float
    beside: Array


def _sums(number: Array, each: Array) -> Array:
    """[row]: of all units; ``each`` [kind, row]."""
    found: Array = number @ each
    return found


def _speeds(number: Array, both: Array, k: Array) -> Array:
    """y [class, row], of which all ranks of a pipeline add up to one."""
    speed = 1 / np.einsum("u,cur->cr", number, both)
    found: Array = speed / (k * speed).sum(axis=0)
    return found


def _plain_s(costs: _Costs, number: Array, k: Array) -> Array:
    """[row]: what the slowest rank takes at least for one microbatch if memory were no matter."""
    y = _speeds(number, costs.both, k)
    found = _sums(number, (y[:, None] * costs.talk[None]).min(axis=0))
    found = np.maximum(found, _sums(number, (y[:, None] * costs.both).min(axis=0)))
    return np.maximum(found, _whole_layers_s(costs.both, number, k))


def _slowest_s(costs: _Costs, at: Any, number: Array, k: Array, kept: Sequence[Array], room: _Room) -> Array:
    """[row]: what the slowest rank takes at least with what memory asks for, of the rows ``at``; ``kept`` as by ``costs.again``."""
    both = costs.both[..., at]
    y = _speeds(number, both, k)
    dealt = [y[:, None] * (both + again[..., at]) for again in costs.again]
    found = np.zeros(k.shape[1])
    for worth in product(range(len(costs.again)), repeat=len(k)):
        price = np.stack([_price(number, dealt, kept, way, place) for place, way in enumerate(worth)])
        each = [t + price[:, None] * b for t, b in zip(dealt, kept, strict=True)]
        least = np.minimum.reduce([e.min(axis=0) for e in each])
        worth_of_room = (price * k * room.each).sum(axis=0) + price.max(axis=0) * room.more
        found = np.maximum(found, number @ least - worth_of_room)
    return found


def _price(number: Array, dealt: Sequence[Array], kept: Sequence[Array], way: int, place: int) -> Array:
    """[row]: λ at which recomputing so costs what its memory is worth on a class; 0 for the first way."""
    if way == 0:
        return np.zeros(dealt[0].shape[2])
    seconds = number @ (dealt[way][place] - dealt[way - 1][place])
    spared = number @ (kept[way - 1][place] - kept[way][place])
    found: Array = np.where(spared > 0, np.maximum(seconds, 0.0) / np.where(spared > 0, spared, 1.0), 0.0)
    return found


def _whole_layers_s(both: Array, number: Array, k: Array) -> Array:
    """[row]: of each kind of unit the least seconds in which its units, whole, are dealt out."""
    found: Array = both.min(axis=0).max(axis=0)
    for kind in np.flatnonzero(number > 1):
        each = both[:, kind]
        seconds = np.maximum(number[kind] / (k / each).sum(axis=0), each.min(axis=0)) * (1 - 1e-12)
        for _ in range(INTEGER_STEPS):
            dealt = (k * np.floor(seconds * (1 + 1e-9) / each)).sum(axis=0)
            following = (each * (np.floor(seconds * (1 + 1e-9) / each) + 1)).min(axis=0)
            seconds = np.where(dealt < number[kind], following * (1 - 1e-9), seconds)
        found = np.maximum(found, seconds)
    return found


def _state_bytes(setup: StepSetup, level: Array, shards: Array) -> Array:
    """[row]: bytes of parameters, gradients and optimizer for each element of a stage, at least (``cost.memory``'s table)."""
    c, g, w = setup.compute_bytes, setup.gradient_bytes, setup.master_bytes
    is_cut = level >= 2
    stored = np.where(is_cut, g, c)
    has_own_masters = setup.is_offloaded | (stored != w)
    of_master = np.where(is_cut | has_own_masters, w, 0)
    of_owned = np.zeros_like(shards) if setup.is_offloaded else of_master + MOMENTS * w
    is_reduced = is_cut | (level * shards > 1)
    of_owned = of_owned + np.where(is_reduced, g, 0) + np.where(is_cut & has_own_masters, g, 0)
    whole = np.where(level >= 3, 0, np.where(level == 2, c, c + g))
    return np.asarray(whole + of_owned / shards)


def _pipeline_s(schedule: Schedule, slowest: Array, costs: _Costs, p: Array, m: Array) -> Array:
    """[row]: ``cost.pipeline`` of ranks that take so long at most, and of the mean stage."""
    if schedule.name in ("1f1b", "gpipe"):
        return (m - 1) * slowest + np.maximum(slowest, costs.all_both)
    sums = (costs.all_forward, costs.all_backward, costs.all_weight)
    found: Array = uneven_pipeline_s(schedule.name, schedule.per_rank, slowest, *sums, p, m)
    return found
