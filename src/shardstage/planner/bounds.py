"""``bounded``: admissible lower bounds of the step time and the memory of all choices of many groups at once.

A choice's stages are not cut yet: whatever the cut, the slowest of p stages takes at least the mean and at least the heaviest unit, and
so does what waits for ZeRO's gathers (by convexity), the optimizer and the memory of parameters.

    seconds >= m × max(mean stage, heaviest unit) + bubble of mean stages + optimizer of a mean stage + the norm's sum

The bubble's formula asks for means only (``cost.pipeline``). Exposed reductions of gradients count where there is no pipeline, as there a
mean stage is the stage. A mean stage recomputes at least what memory asks for (``trade``).

Arrays are [row, 1]; a row is a group, a mesh and a ZeRO, and under schedules with several stages a rank so many of them. Rows whose mean
stages alone take too long or hold too much get no closer bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from shardstage.cost.compute import optimizer_s
from shardstage.cost.links import each_exposed_s
from shardstage.cost.memory import MOMENTS
from shardstage.cost.offload import offloaded_update_s
from shardstage.cost.pipeline import LATE_BUBBLES, SPLITTING
from shardstage.cost.profile import Recompute
from shardstage.planner.even import COUNTED_LAYERS, EvenCuts
from shardstage.planner.figures import Figures
from shardstage.planner.lattice import Lattice, Pairs, Rows
from shardstage.planner.space import MAX_STAGES_PER_RANK, Choice
from shardstage.planner.terms import BoundSettings, Terms
from shardstage.planner.trade import Trade
from shardstage.schedule import SCHEDULES, STEADY_ROUNDS

__all__ = ["Bounds", "bounded"]

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Bounds:
    """Lower bounds [row, schedule]: ``seconds``, and ``least_bytes`` of the fullest rank; infinite where the space has no such choice.

    Left out are ``num_slow`` choices that take ``least_slow_s`` at least, and ``num_large`` ones that hold ``least_large_bytes``.
    """

    lattice: Lattice
    rows: Rows
    seconds: Array
    least_bytes: Array
    num_slow: int
    num_large: int
    least_slow_s: float
    least_large_bytes: float

    def choice(self, index: int) -> Choice:
        row, schedule = divmod(index, self.seconds.shape[1])
        lattice = self.lattice
        return Choice(
            mesh=lattice.meshes.sizes[self.rows.mesh[row]],
            group=lattice.groups[self.rows.group[row]],
            zero=lattice.zeros[self.rows.zero[row]],
            schedule=lattice.schedules[schedule],
        )


def bounded(
    lattice: Lattice,
    figures: Figures,
    groups: Any,
    settings: BoundSettings,
    even: EvenCuts,
    below_s: float = math.inf,
    most_per_rank: float = math.inf,
) -> Bounds:
    """Bounds of all choices of groups (their numbers) that may take less than ``below_s`` and fit. ``figures`` are of all groups,
    ``even`` the cuts of schedules with several stages a rank. Schedules of more than ``most_per_rank`` stages a rank are not looked at."""
    terms = Terms(lattice, figures.at(groups), groups, settings, even)
    pairs = lattice.pairs(groups)
    pair_s = _loosest_s(terms, pairs)
    is_early = pair_s >= below_s
    rows = lattice.rows(pairs.at(~is_early))
    table = _Table(terms, rows)
    is_large = (table.mean_bytes > settings.limit_bytes)[:, 0]
    mean_s, mean_bytes = table.mean_s[:, 0], table.mean_bytes[is_large]
    is_slow = ~is_large & (mean_s >= below_s)
    meshes = lattice.meshes
    num_schedules = meshes.has_schedule.sum(axis=1)[rows.mesh]
    is_open = ~is_large & ~is_slow
    rows = rows.at(is_open)
    seconds, least_bytes = _of_schedules(lattice, rows, table.at(is_open), below_s, most_per_rank)
    return Bounds(
        lattice=lattice,
        rows=rows,
        seconds=seconds,
        least_bytes=least_bytes,
        num_slow=int(num_schedules[is_slow].sum() + meshes.num_choices[pairs.mesh[is_early]].sum()),
        num_large=int(num_schedules[is_large].sum()),
        least_slow_s=float(
            min(mean_s[is_slow].min(initial=math.inf), pair_s[is_early].min(initial=math.inf))
        ),
        least_large_bytes=float(mean_bytes.min(initial=math.inf)),
    )


def _loosest_s(terms: Terms, pairs: Pairs) -> Array:
    """[pair]: whatever the ZeRO and the schedule, all microbatches on the mean stage and the least bubble of all schedules."""
    meshes, group = terms.meshes, terms.number[pairs.group]
    p, m = meshes.pp[pairs.mesh], np.ceil(meshes.share[pairs.mesh] / terms.microbatch[group])
    forward = terms.forward[group] / p
    mean = forward + terms.backward[group] / p
    slowest = np.maximum(mean, terms.slowest_unit[group])
    bubble = (p - 1) * np.minimum(mean / MAX_STAGES_PER_RANK, forward / 2)
    found: Array = terms.settings.step_s(m * slowest + bubble, m * mean, 0.0)
    return found


def _of_schedules(
    lattice: Lattice, rows: Rows, table: _Table, below_s: float, most_per_rank: float
) -> tuple[Array, Array]:
    """[row, schedule]: seconds and bytes."""
    seconds = np.full((len(rows.mesh), len(lattice.schedules)), np.inf)
    least_bytes = np.full_like(seconds, np.inf)
    has, mean_bytes = lattice.meshes.has_schedule[rows.mesh], table.mean_bytes[:, 0]
    for name in dict.fromkeys(schedule.name for schedule in lattice.schedules):
        columns = [
            (i, each.per_rank)
            for i, each in enumerate(lattice.schedules)
            if each.name == name and each.per_rank <= most_per_rank
        ]
        if not columns:
            continue
        places, numbers = np.array(columns).T
        row, number = np.nonzero(has[:, places])
        column, per_rank = places[number], numbers[number][:, None].astype(np.float64)
        loose_s = table.at(row, _LOOSE).loose_s(name, per_rank)[:, 0]
        seconds[row, column], least_bytes[row, column] = loose_s, mean_bytes[row]
        is_open = loose_s < below_s
        if is_open.any():
            row, column, per_rank = row[is_open], column[is_open], per_rank[is_open]
            found_s, found_bytes = table.at(row).of(name, per_rank)
            seconds[row, column], least_bytes[row, column] = found_s[:, 0], found_bytes[:, 0]
    return seconds, least_bytes


_LOOSE: Final = ("p", "m", "forward", "backward", "after", "_slowest_unit_s")
"""What ``_Table.loose_s`` asks for."""


class _Table:
    """Figures of some rows as arrays."""

    def __init__(self, terms: Terms, rows: Rows) -> None:
        self.terms, self.settings = terms, terms.settings
        self._mesh = mesh = rows.mesh
        self.group = terms.number[rows.group][:, None]
        self._ranks: dict[str, _EvenRanks] = {}
        meshes, talk = terms.meshes, terms.meshes.talk
        self._talk = talk
        self.p = self._of_meshes(meshes.pp)
        self.m = np.ceil(self._of_meshes(meshes.share) / terms.microbatch[self.group])
        self._level = terms.levels[rows.zero][:, None]
        self._is_near = terms.are_near[rows.zero][:, None]
        self._is_gathered, self._is_scattered = self._level == 3, self._level >= 2
        whole = self._of_meshes(talk.replicas)
        self._has_copies = whole > 1
        of_shards = mesh + len(meshes.sizes) * self._is_near[:, 0]
        self._gather = talk.gather[of_shards] * self._has_copies
        self._scatter = talk.scatter[of_shards] * self._has_copies
        self._copies = talk.copies[mesh] * (self._has_copies & self._is_near)
        self._near_ranks = self._of_meshes(talk.near_ranks)
        self._shards = np.where(self._level == 0, 1.0, np.where(self._is_near, self._near_ranks, whole))
        self._expert_shards = np.maximum(1, np.floor(self._shards / terms.ep[self.group]))
        p = self.p
        own = terms.own[self.group]
        elements = own + terms.figures.shared[self.group]
        part = self._part_elements(elements, terms.experts[self.group]) / p
        self._plain_f, self._plain_b = terms.forward[self.group] / p, terms.backward[self.group] / p
        self._gathered, self._scattered = self._zero_talk_s(own, terms.gathers[self.group])
        self._accumulation = self._accumulation_s(elements / p, part)
        self._is_summed_whole = ~self._is_scattered & (self.m > 1)
        self._slowest_unit_s = np.where(
            self._is_summed_whole,
            terms.slowest_summed_unit[self.group],
            terms.slowest_unit[self.group],
        )
        self.forward, self.backward = self.stage_s(0.0)
        travel = 2 * (p - 1) * _seconds_of(talk.transfer[mesh], terms.figures.received[self.group], 1.0)
        after = self._after_s(elements / p, self._plain_b * p + self._accumulation)
        self.after = after + self._update_s(part) + self._of_meshes(talk.norm_s) + travel
        self.state_bytes = self._state_bytes(elements / p, part)

    def at(self, rows: Any, names: Sequence[str] = ()) -> _Table:
        """Of some of the rows, by a mask or by their numbers; all figures, or only those of these names."""
        part = copy(self)
        for name in names or vars(self):
            values = getattr(self, name)
            if isinstance(values, np.ndarray):
                setattr(part, name, values[rows])
        part._ranks = {}
        return part

    def _of_meshes(self, values: Any) -> Any:
        """Figures of meshes, for each row."""
        return values[self._mesh][:, None]

    @property
    def mean_s(self) -> Any:
        """Whatever the schedule: all microbatches on the mean stage, the least bubble of all schedules, and what comes after."""
        mean = self.forward + self.backward
        slowest = np.maximum(mean, self._slowest_unit_s)
        bubble = (self.p - 1) * np.minimum(mean / MAX_STAGES_PER_RANK, self._plain_f / 2)
        return self._seconds(self.m * slowest + bubble, mean)

    @property
    def mean_bytes(self) -> Any:
        """Whatever the schedule: the state of a mean rank, and a microbatch."""
        return self.state_bytes + self.terms.trade.least_saved[self.group] / self.p

    def _seconds(self, pipeline_s: Any, mean: Any) -> Any:
        return self.settings.step_s(pipeline_s, self.m * mean, self.after)

    def loose_s(self, name: str, per_rank: Array) -> Any:
        """Seconds of a schedule with so many stages a rank, if nothing is recomputed and all stages are as fast as the mean."""
        mean = self.forward + self.backward
        slowest = np.maximum(mean, self._slowest_unit_s)
        if name in ("1f1b", "gpipe"):
            return self._seconds((self.m - 1) * slowest + self.p * mean, mean)
        bubble = self._bubble_s(name, per_rank, self.forward / per_rank, self.backward / per_rank)
        return self._seconds(self.m * slowest + bubble, mean)

    def of(self, name: str, per_rank: Array) -> tuple[Any, Any]:
        """Seconds and bytes of a schedule with so many stages a rank."""
        return self._of_free_cuts(name) if per_rank.max() == 1 else self._of_even_cuts(name, per_rank)

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

    def _zero_talk_s(self, own: Any, calls: Any) -> tuple[Any, Any]:
        """What ZeRO-2/3 gathers and reduces on a mean stage for each microbatch, forward and backward."""
        gather, scatter = self._gather_and_scatter_s(own / self.p, calls / self.p)
        again = np.where(self._is_gathered, gather, 0.0)
        return np.where(self._is_scattered, gather, 0.0), np.where(self._is_scattered, again + scatter, 0.0)

    def _gather_and_scatter_s(self, own: Any, calls: Any) -> tuple[Any, Any]:
        gather_s = _seconds_of(self._gather, own * self.settings.compute_bytes, calls)
        return gather_s, self._scatter_s(own * self.settings.gradient_bytes, calls)

    def _exposed_s(self, talk: Any, compute: Any, first: Any = 0.0) -> Any:
        """Convex, so a mean stage's is at most the stages' mean."""
        return each_exposed_s(talk, compute, self.terms.slowdown, first)

    def _accumulation_s(self, own: Any, part: Any) -> Any:
        """Adding a microbatch's gradients to their sums, where there is more than one."""
        added = np.where(self._is_scattered, part, own) * np.where(self.m > 1, 1.0, 0.0)
        return added * self.settings.summing_s

    def _update_s(self, part: Any) -> Any:
        """The optimizer of a mean stage; parameters come up from the host at least as narrow as they are stored."""
        settings, device = self.settings, self.settings.device
        c, g, w = settings.compute_bytes, settings.gradient_bytes, settings.master_bytes
        if settings.is_offloaded:
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

    def _scatter_s(self, num_bytes: Any, calls: Any) -> Any:
        """Summing and cutting gradients, and summing the parts with those of the copies."""
        scatter_s = _seconds_of(self._scatter, num_bytes, calls)
        return scatter_s + _seconds_of(self._copies, num_bytes / self._near_ranks, calls)

    def _of_free_cuts(self, name: str) -> tuple[Any, Any]:
        """One stage a rank, of which each may recompute otherwise; ``held`` microbatches at least are in flight on all of them."""
        m, p, trade = self.m, self.p, self.terms.trade
        held = {"gpipe": m, "zb-h1": np.minimum(m, p)}.get(name, 1.0)
        again = trade.again_s(p * (self.settings.limit_bytes - self.state_bytes) / held, self.group) / p
        mean = sum(self.stage_s(again))
        fullest_s, fullest_bytes = self._of_most_layers(held)
        alone_s, alone_bytes = self._of_one_layer(held)
        slowest = np.maximum(mean, np.maximum(np.maximum(fullest_s, alone_s), self._slowest_unit_s))
        if name in ("1f1b", "gpipe"):
            total = (m - 1) * slowest + p * mean
        else:
            total = m * slowest + self._bubble_s(name, 1.0, self.forward, self.backward)
        least_saved = trade.least_saved[self.group]
        least_bytes = np.maximum(
            self.state_bytes + held * least_saved / p, np.maximum(fullest_bytes, alone_bytes)
        )
        return self._seconds(total, mean), least_bytes

    def _of_most_layers(self, held: Any) -> tuple[Any, Any]:
        """Of the stage that has most units of the kinds that take longest in all: at least their even share, rounded up."""
        terms, group = self.terms, self.group
        number = np.ceil(terms.most_number[group] / self.p)
        own, experts = number * terms.most_own[group], number * terms.most_experts[group]
        state = self.rank_state_bytes(own, experts, terms.most_own[group]) + terms.most_passing[group]
        of_unit = (self.settings.limit_bytes - state) / (held * number)
        again = terms.most_trade.again_s(of_unit, group)
        summing_s = np.where(self._is_summed_whole, own * self.settings.summing_s, 0.0)
        seconds = number * (terms.most_both[group] + again) + summing_s
        return seconds, state + held * number * terms.most_trade.least_saved[group]

    def _of_one_layer(self, held: Any) -> tuple[Any, Any]:
        """Of a unit of these kinds by itself, which is recomputed in one of the ways and not between them."""
        terms, group, limit_bytes = self.terms, self.group, self.settings.limit_bytes
        own = terms.most_own[group]
        state = self.rank_state_bytes(own, terms.most_experts[group], own)
        seconds: Any = np.inf
        least_bytes: Any = np.inf
        for again, saved, passing in terms.most_modes:
            num_bytes = state + held * saved[group] + passing[group]
            seconds = np.where(num_bytes <= limit_bytes, np.minimum(seconds, again[group]), seconds)
            least_bytes = np.minimum(least_bytes, num_bytes)
        summing_s = np.where(self._is_summed_whole, own * self.settings.summing_s, 0.0)
        again_s = np.where(np.isfinite(seconds), seconds, 0.0)
        return terms.most_both[group] + again_s + summing_s, least_bytes

    def _of_even_cuts(self, name: str, v: Any) -> tuple[Any, Any]:
        """Several stages a rank, which recompute alike: all of the layers where one way is asked for, else as few as they need to."""
        m, p, ranks = self.m, self.p, self._ranks_of(name, v)
        first, *others = self.settings.modes
        if others:
            mean_again, least_again, least_bytes = self._alike(ranks)
        else:
            mean_again, least_again = self.terms.again_whole[first][self.group] / p, 0.0
            least_bytes = ranks.num_bytes(first)
        forward, backward = self.stage_s(mean_again, ranks.mean_first_s)
        heaviest = np.where(
            self._is_summed_whole, ranks.of("slowest, summing", first), ranks.of("slowest", first)
        )
        heaviest = heaviest + least_again + ranks.least_first_s
        slowest = np.maximum(forward + backward, np.maximum(heaviest, self._slowest_unit_s))
        bubble = self._bubble_s(name, v, forward / v, backward / v)
        return self._seconds(m * slowest + bubble, forward + backward), least_bytes

    def _alike(self, ranks: _EvenRanks) -> tuple[Any, Any, Any]:
        """Seconds of recomputation of a mean rank and of any rank at least, and bytes, where stages recompute equally many layers.

        What the fullest rank lacks, each of its stages spares.
        """
        terms, limit_bytes = self.terms, self.settings.limit_bytes
        none, *others = self.settings.modes
        whole_bytes = ranks.num_bytes(none)
        saved = np.minimum.reduce([ranks.of("saved", mode) for mode in others])
        passing = np.minimum.reduce([ranks.of("passing", mode) for mode in self.settings.modes])
        trade = terms.layer_trade
        if trade is not None:
            passing = np.maximum(passing, terms.layer_passing[self.group])
        least_bytes = np.minimum(whole_bytes, ranks.state + ranks.in_flight(saved) + passing)
        if trade is None:
            return 0.0, 0.0, least_bytes
        room = limit_bytes - ranks.state - passing
        missing = ranks.in_flight(ranks.of("saved", none)) - room
        missing = np.where(whole_bytes > limit_bytes, np.maximum(0.0, missing), 0.0)
        mean_again, least_again = np.zeros_like(missing), np.zeros_like(missing)
        at = np.nonzero(missing > 0)
        if len(at[0]):
            group = np.broadcast_to(self.group, missing.shape)[at]
            mean_again[at], least_again[at] = ranks.again_s(at[0], missing[at], group, trade)
        return mean_again, least_again, least_bytes

    def _ranks_of(self, name: str, v: Any) -> _EvenRanks:
        """What even cuts make of ranks: the same under both schedules that lay stages in a V."""
        places = SCHEDULES[name].places
        if places not in self._ranks:
            self._ranks[places] = _EvenRanks(self, name, v)
        return self._ranks[places]

    def rank_state_bytes(self, own: Any, experts: Any, largest_unit: Any) -> Any:
        """Of a rank with so many elements, and under ZeRO-2/3 the gradients of its largest unit while they are reduced."""
        reduced = np.where(self._is_scattered, largest_unit * self.settings.gradient_bytes, 0.0)
        return self._state_bytes(own, self._part_elements(own, experts)) + reduced

    def held(self, name: str, v: Any, most: int) -> Any:
        """[row, stage]: microbatches that one of the ranks holds at once on each of its stages, 0 beyond the v-th: the first in rounds,
        just before its first backward, the last in a V (``schedule.held``)."""
        m, p, stage = self.m, self.p, np.arange(most)[None]
        if name in SPLITTING:
            each = np.minimum(m, p)
        elif name == "looped-bfs":
            each = m
        else:
            m = np.minimum(m, STEADY_ROUNDS * p + m % p)
            rounds = np.maximum(1, np.floor(m / p))
            done = np.minimum(m * v, 2 * (p - 1) + (v - 1) * np.ceil(m / rounds) + 1)
            full = np.floor(done * rounds / (m * v))
            full += (full < rounds) & (v * np.floor(m * (full + 1) / rounds) <= done)
            start, stop = (np.floor(m * np.minimum(n, rounds) / rounds) for n in (full, full + 1))
            each = start + np.clip(done - v * start - stage * (stop - start), 0, stop - start)
        return np.where(stage < v, each, 0.0)

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
    """Ranks of even cuts, [row, 1], or [row, stage] of their fullest one; what was asked once is kept."""

    def __init__(self, table: _Table, name: str, v: Any) -> None:
        self._known: dict[tuple[str, Recompute], Any] = {}
        self._terms = terms = table.terms
        self._name = name
        p, v_ = table.p.astype(np.int64), v.astype(np.int64)
        place = terms.even.ranks(name).place
        self._places = (place[p, np.minimum(v_, place.shape[1] - 1)] * terms.num_groups + table.group)[:, 0]
        self._held = table.held(name, v, place.shape[1] - 1)
        self.state = table.rank_state_bytes(self.of("own"), self.of("experts"), self.of("largest"))
        self.mean_first_s = table.first_s(self.of("mean first own"), self.of("mean first calls"))
        self.least_first_s = sum(table.first_s(self.of("least first own"), self.of("least first calls")))

    def of(self, figure: str, mode: Recompute = "none") -> Any:
        if (figure, mode) not in self._known:
            found = self._terms.of_ranks(self._name, figure, mode)[self._places]
            self._known[figure, mode] = found if found.ndim == 2 else found[:, None]
        return self._known[figure, mode]

    def in_flight(self, of_stages: Any) -> Any:
        """What the fullest rank's microbatches add up to, of a figure of its stages."""
        return np.einsum("rs,rs->r", self._held, of_stages)[:, None]

    def again_s(self, at: Any, missing: Any, group: Any, trade: Trade) -> tuple[Any, Any]:
        """Seconds of recomputation of a mean rank and of any rank, at least, in the rows ``at``, whose fullest rank lacks so many bytes.

        Short stages recompute whole layers: f in full and those up to e selectively, where these spare enough; of a long one a fraction.
        """
        table, row = self._terms.even.ranks(self._name), self._places[at] // self._terms.num_groups
        held, most = self._held[at], table.most_layers[row]
        of_long = trade.again_s(-missing / held.sum(axis=1) / most, group) * table.layers[:, row, -1]
        selective, full = (each[group] for each in self._terms.layer_seconds)
        spared, spared_full = (each[group] for each in self._terms.layer_bytes)
        layers = [table.layers[:, row, number] for number in range(COUNTED_LAYERS + 1)]
        kept = [np.einsum("rs,rs->r", held, of_stages[row]) for of_stages in table.layers_of_fullest[:-1]]
        found = np.full((2, len(most)), np.inf)
        for f, e in combinations_with_replacement(range(COUNTED_LAYERS + 1), 2):
            is_enough = kept[f] * spared_full + (kept[e] - kept[f]) * spared >= missing * (1 - 1e-9)
            seconds = layers[f] * full + (layers[e] - layers[f]) * selective
            found = np.where(is_enough, np.minimum(found, seconds), found)
        is_long = (most > COUNTED_LAYERS) | ~np.isfinite(found[0])
        found = np.where(is_long, of_long, found)
        return found[0], found[1]

    def num_bytes(self, mode: Recompute) -> Any:
        """What the fullest rank holds at least."""
        return self.state + self.in_flight(self.of("saved", mode)) + self.of("passing", mode)
