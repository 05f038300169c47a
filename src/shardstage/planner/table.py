"""``Table``: lower bounds of rows, [row, 1]: a group, a mesh and a ZeRO each, and, under schedules of several stages a rank, these.

A choice's stages are not cut yet: whatever the cut, the slowest of p stages takes at least the mean and at least the heaviest unit, and
so does what waits for ZeRO's gathers (by convexity), the optimizer and the memory of parameters.

    seconds >= m × max(mean stage, heaviest unit) + bubble of mean stages + optimizer of a mean stage + the norm's sum

The bubble's formula asks for means only (``cost.pipeline``). Exposed reductions of gradients count where there is no pipeline, as there a
mean stage is the stage. A mean stage recomputes at least what memory asks for (``trade``).
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from itertools import combinations_with_replacement
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from shardstage.cost.compute import optimizer_s
from shardstage.cost.links import each_exposed_s
from shardstage.cost.memory import MOMENTS
from shardstage.cost.offload import offloaded_update_s
from shardstage.cost.pipeline import SPLITTING, each_bubble_s
from shardstage.cost.profile import Recompute
from shardstage.planner.even import COUNTED_LAYERS, unlike_pairs
from shardstage.planner.lattice import Rows
from shardstage.planner.space import MAX_STAGES_PER_RANK
from shardstage.planner.terms import Terms
from shardstage.planner.trade import Trade
from shardstage.schedule import held_in_rounds

__all__ = ["LOOSE", "Table"]

Array = npt.NDArray[np.float64]

ROUNDED_UP: Final = 4.0
"""Elements by which a rank's parts under ZeRO exceed a share: one of an expert and one of what is none, for each of two stages."""

LOOSE: Final = ("p", "m", "forward", "backward", "_weight", "after", "_slowest_unit_s")
"""What ``Table.loose_s`` asks for."""


class Table:
    """Figures of some rows as arrays."""

    def __init__(self, terms: Terms, rows: Rows) -> None:
        self.terms, self.settings = terms, terms.settings
        self._mesh = mesh = rows.mesh
        self.group = terms.number[rows.group][:, None]
        meshes, talk = terms.meshes, terms.meshes.talk
        self._talk = talk
        self.p = self._of_meshes(meshes.pp)
        self.m = np.ceil(self._of_meshes(meshes.share) / terms.microbatch[self.group])
        whole = self._of_meshes(talk.replicas)
        self._has_copies = whole > 1
        self._level = terms.levels[rows.zero][:, None] * self._has_copies
        self._is_near = terms.are_near[rows.zero][:, None]
        self._is_gathered, self._is_scattered = self._level == 3, self._level >= 2
        of_shards = mesh + len(meshes.sizes) * self._is_near[:, 0]
        self._gather = talk.gather[of_shards] * self._has_copies
        self._scatter = talk.scatter[of_shards] * self._has_copies
        self._copies = talk.copies[mesh] * (self._has_copies & self._is_near)
        self._near_ranks = self._of_meshes(talk.near_ranks)
        self._shards = np.where(self._level == 0, 1.0, np.where(self._is_near, self._near_ranks, whole))
        holders = np.where(self._level > 0, terms.holders[self.group], 1.0)
        self._expert_shards = np.maximum(1, np.floor(self._shards * holders / terms.ep[self.group]))
        p = self.p
        shared, replicated = terms.figures.shared[self.group], terms.replicated[self.group]
        elements = terms.own[self.group] + shared
        part = self._part_elements(elements, terms.experts[self.group]) / p
        self._plain_f, self._plain_b = terms.forward[self.group] / p, terms.backward[self.group] / p
        self._gathered, self._scattered = self._zero_talk_s(replicated, terms.gathers[self.group])
        self._accumulation = self._accumulation_s(elements / p, part)
        self.is_summed_whole = ~self._is_scattered & (self.m > 1)
        self._slowest_unit_s = np.where(
            self.is_summed_whole,
            terms.slowest_summed_unit[self.group],
            terms.slowest_unit[self.group],
        )
        self.forward, self.backward = self.stage_s(0.0)
        self._weight = self._most_weight_s()
        late = self._late_s(replicated, terms.gathers[self.group])
        after = self._after_s((replicated + shared) / p, self._plain_b * p + self._accumulation)
        update = self._update_s(part) + self._of_meshes(talk.norm_s)
        self.after = late + after + update + self._least_travel_s()
        self.state_bytes = self._state_bytes(elements / p, terms.experts[self.group] / p)

    def at(self, rows: Any, names: Sequence[str] = ()) -> Table:
        """Of some of the rows, by their numbers, which is far quicker than by a mask; all figures, or only those of these names."""
        part = copy(self)
        for name in names or vars(self):
            values = getattr(self, name)
            if isinstance(values, np.ndarray):
                setattr(part, name, values.take(rows, axis=0))
        return part

    def _most_weight_s(self) -> Any:
        """What of a mean rank's backward can be put off at most: each stage adds up the gradients of what it shares with others."""
        terms, group = self.terms, self.group
        more = np.where(self.m > 1, terms.more_summed[group] / self.p + ROUNDED_UP, 0.0)
        return terms.weight[group] / self.p + self._accumulation + more * self.settings.summing_s

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
        bubble = self._bubble_s(name, per_rank, self.forward, self.backward)
        return self._seconds(self.m * slowest + bubble, mean)

    def uncut_s(self, name: str, per_rank: Array) -> Any:
        """Seconds of a schedule with several stages a rank wherever they are cut.

        Some rank has its even share, rounded up, of the units of the kinds that take longest in all, and each stage waits for the gather
        of another first unit.
        """
        terms, num_stages = self.terms, self.p * per_rank
        first_s = self.first_s(
            terms.least_replicated.of(num_stages, self.group) / self.p,
            terms.least_calls.of(num_stages, self.group) / self.p,
        )
        forward, backward = self.stage_s(0.0, first_s)
        number = np.ceil(terms.most_number[self.group] / self.p)
        fullest_s = number * terms.most_both[self.group] + self._summing_s(
            number * terms.most_own[self.group]
        )
        slowest = np.maximum(forward + backward, np.maximum(fullest_s, self._slowest_unit_s))
        bubble = self._bubble_s(name, per_rank, forward, backward)
        return self._seconds(self.m * slowest + bubble, forward + backward)

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
        """ZeRO-3's gathers and ZeRO-2/3's reductions of the first units of a rank's stages, beside which nothing runs."""
        gather_s, scatter_s = self._gather_and_scatter_s(own, calls)
        return np.where(self._is_gathered, gather_s, 0.0), np.where(self._is_scattered, scatter_s, 0.0)

    def _zero_talk_s(self, own: Any, calls: Any) -> tuple[Any, Any]:
        """What ZeRO-3 gathers and ZeRO-2/3 reduces on a mean stage for each microbatch, forward and backward."""
        gather, scatter = self._gather_and_scatter_s(own / self.p, calls / self.p)
        gather = np.where(self._is_gathered, gather, 0.0)
        return gather, np.where(self._is_scattered, gather + scatter, 0.0)

    def _late_s(self, own: Any, calls: Any) -> Any:
        """How late a step begins at least as ZeRO-2 gathers its parameters: of p ranks' gathers g and forwards f, the largest
        g_r - (f_0 + ... + f_r-1), which is at least the means' g - (p - 1) f."""
        gather, _ = self._gather_and_scatter_s(own / self.p, calls / self.p)
        late = np.maximum(0.0, gather - (self.p - 1) * self._plain_f)
        return np.where(self._is_scattered & ~self._is_gathered, late, 0.0)

    def with_talk_of_experts(self) -> Table:
        """With ZeRO-2/3's gathers and sums of experts that are dealt out, which go over ranks of their own (``Links``): left out at first,
        as these are of many sizes."""
        terms, settings = self.terms, self.settings
        at = np.flatnonzero(self._is_scattered[:, 0] & terms.deals_out_experts[self.group[:, 0]])
        if not len(at):
            return self
        group = self.group[at, 0]
        known, size = unlike_pairs(self._expert_shards[at, 0], terms.expert_stride[group])
        gather_s, scatter_s = (
            np.array([1 / terms.costs.cost(kind, *pair).bytes_per_s for pair in known])[size]
            for kind in ("all_gather", "reduce_scatter")
        )
        experts = terms.experts[group] / self.p[at, 0]
        gathered = experts * settings.compute_bytes * gather_s
        table = copy(self)
        table._gathered, table._scattered = self._gathered.copy(), self._scattered.copy()
        gathered = np.where(self._is_gathered[at, 0], gathered, 0.0)
        table._gathered[at, 0] += gathered
        table._scattered[at, 0] += gathered + experts * settings.gradient_bytes * scatter_s
        table.forward, table.backward = table.stage_s(0.0)
        return table

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

    def _least_travel_s(self) -> Any:
        """Of the first microbatch and of the last one's gradient (``Links.least_travel_s``)."""
        if self.settings.device.alone_ratio > 1:
            return 0.0
        received = self.terms.figures.received[self.group]
        return 2 * (self.p - 1) * _seconds_of(self._talk.transfer[self._mesh], received, 1.0)

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

    def _state_bytes(self, own: Any, experts: Any) -> Any:
        """Parameters, gradients and optimizer of a stage, of whose elements so many are of experts."""
        settings, level = self.settings, self._level
        c, g, w = settings.compute_bytes, settings.gradient_bytes, settings.master_bytes
        part = self._part_elements(own, experts)
        reduced = part - np.where(self._expert_shards == 1, experts, 0.0)
        whole = np.where(level == 3, 0.0, own)
        gradients = np.where(level >= 2, part * g, own * g + np.where(level == 1, reduced * g, 0.0))
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
        forward, backward = self.stage_s(again)
        mean = forward + backward
        fullest_s, fullest_bytes = self._of_most_layers(held)
        alone_s, alone_bytes = self._of_one_layer(held)
        slowest = np.maximum(mean, np.maximum(np.maximum(fullest_s, alone_s), self._slowest_unit_s))
        if name in ("1f1b", "gpipe"):
            total = (m - 1) * slowest + p * mean
        else:
            total = m * slowest + self._bubble_s(name, 1.0, forward, backward)
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
        seconds = number * (terms.most_both[group] + again) + self._summing_s(own)
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
        again_s = np.where(np.isfinite(seconds), seconds, 0.0)
        return terms.most_both[group] + again_s + self._summing_s(own), least_bytes

    def most_stage_s(self, below_s: float) -> Any:
        """What the slowest of stages under 1F1B may take where a step is to take less than ``below_s``."""
        settings = self.settings
        room_s = settings.device.alone_ratio * (below_s / settings.least_factor - self.after)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.minimum(room_s, (room_s - self.p * (self.forward + self.backward)) / (self.m - 1))

    def least_of_layer(self) -> tuple[Any, Any]:
        """Seconds and bytes of state of a unit of the kinds that take longest in all."""
        own, experts = self.terms.most_own[self.group], self.terms.most_experts[self.group]
        state = self._state_bytes(own, experts)
        return self.terms.most_both[self.group] + self._summing_s(own), state

    def most_layer_bytes(self) -> Any:
        """What a rank with such units has for their state and for what they keep."""
        own = self.terms.most_own[self.group]
        beside = self.rank_state_bytes(0.0, 0.0, own) + self.terms.most_passing[self.group]
        return self.settings.limit_bytes - beside

    def _summing_s(self, own: Any) -> Any:
        """Of a rank with so many elements, where their gradients are added up whole."""
        return np.where(self.is_summed_whole, own * self.settings.summing_s, 0.0)

    def _of_even_cuts(self, name: str, v: Any) -> tuple[Any, Any]:
        """Several stages a rank, which recompute alike: all of the layers where one way is asked for, else as few as they need to."""
        m, p, ranks = self.m, self.p, _FullestRanks(self, name, v)
        first, *others = self.settings.modes
        if others:
            mean_again, least_again, least_bytes = self._alike(ranks)
        else:
            mean_again, least_again = self.terms.again_whole[first][self.group] / p, 0.0
            least_bytes = ranks.num_bytes(first)
        forward, backward = self.stage_s(mean_again, ranks.mean_first_s)
        heaviest = ranks.slowest_s(first) + least_again + ranks.least_first_s
        slowest = np.maximum(forward + backward, np.maximum(heaviest, self._slowest_unit_s))
        bubble = self._bubble_s(name, v, forward, backward)
        return self._seconds(m * slowest + bubble, forward + backward), least_bytes

    def _alike(self, ranks: _FullestRanks) -> tuple[Any, Any, Any]:
        """Seconds of recomputation of a mean rank and of any rank at least, and bytes, where stages recompute equally many layers.

        What the fullest rank lacks, each of its stages spares.
        """
        terms, limit_bytes = self.terms, self.settings.limit_bytes
        none, *others = self.settings.modes
        whole_bytes = ranks.num_bytes(none)
        saved = np.minimum.reduce([ranks.saved(mode) for mode in others])
        passing = np.minimum.reduce([ranks.passing(mode) for mode in self.settings.modes])
        trade = terms.layer_trade
        if trade is not None:
            passing = np.maximum(passing, terms.layer_passing[self.group])
        least_bytes = np.minimum(whole_bytes, ranks.state + ranks.in_flight(saved) + passing)
        if trade is None:
            return 0.0, 0.0, least_bytes
        room = limit_bytes - ranks.state - passing
        missing = ranks.in_flight(ranks.saved(none)) - room
        missing = np.where(whole_bytes > limit_bytes, np.maximum(0.0, missing), 0.0)
        mean_again, least_again = np.zeros_like(missing), np.zeros_like(missing)
        at = np.nonzero(missing > 0)
        if len(at[0]):
            group = np.broadcast_to(self.group, missing.shape)[at]
            mean_again[at], least_again[at] = ranks.again_s(at[0], missing[at], group, trade)
        return mean_again, least_again, least_bytes

    def rank_state_bytes(self, own: Any, experts: Any, largest_unit: Any) -> Any:
        """Of a rank with so many elements, and under ZeRO-2/3 the gradients of its largest unit while they are reduced."""
        reduced = np.where(self._is_scattered, largest_unit * self.settings.gradient_bytes, 0.0)
        return self._state_bytes(own, experts) + reduced

    def held(self, name: str, v: Any, most: int) -> Any:
        """[row, stage]: microbatches that one of the ranks holds at once on each of its stages, 0 beyond the v-th: the first in rounds,
        just before its first backward, the last in a V (``schedule.held``)."""
        m, p, stage = self.m, self.p, np.arange(most)[None]
        if name in SPLITTING:
            each = np.minimum(m, p)
        elif name == "looped-bfs":
            each = m
        else:
            each = held_in_rounds(p, m, v, 0, stage)
        return np.where(stage < v, each, 0.0)

    def _bubble_s(self, name: str, v: Any, forward: Any, backward: Any) -> Any:
        """Of a mean rank with v stages."""
        return each_bubble_s(name, v, forward / v, backward / v, self._weight / v, self.p, self.m)


def _seconds_of(cost: Array, num_bytes: Any, calls: Any) -> Any:
    """Collectives from seconds before the first byte and for each byte, [row, 2]."""
    return calls * cost[:, :1] + num_bytes * cost[:, 1:]


class _FullestRanks:
    """Ranks of even cuts, [row, 1], or [row, stage] of their fullest one."""

    def __init__(self, table: Table, name: str, v: Any) -> None:
        self._table = table
        self._even = table.terms.even.ranks(name, table.p[:, 0], v[:, 0])
        self._group = table.group[:, 0]
        self._held = table.held(name, v, self._even.num_stages)
        even, own = self._even, self._of("own")
        replicated, calls = self._of("replicated"), self._of("calls")
        self.state = table.rank_state_bytes(
            even.of_fullest(own)[:, None],
            even.of_fullest(self._of("experts"))[:, None],
            even.most_of_fullest(own)[:, None],
        )
        self.mean_first_s = table.first_s(
            even.mean_first(replicated)[:, None], even.mean_first(calls)[:, None]
        )
        self.least_first_s = sum(
            table.first_s(even.least_first(replicated)[:, None], even.least_first(calls)[:, None])
        )

    def _of(self, name: str, mode: Recompute | None = None) -> Any:
        """A figure of kinds of units, [kind, row]."""
        values = getattr(self._table.terms.figures, name)
        return (values if mode is None else values[mode])[:, self._group]

    def slowest_s(self, mode: Recompute) -> Any:
        """The slowest rank's seconds for one microbatch, without what ZeRO waits for."""
        of_kinds = self._of("both_s") + self._of("again_s", mode)
        summed_s = self._table.terms.summing_s[:, self._group] * self._table.is_summed_whole[:, 0]
        return self._even.slowest(of_kinds + summed_s)[:, None]

    def saved(self, mode: Recompute) -> Any:
        """[row, stage]: what the stages of the fullest keep of a microbatch."""
        return self._even.stages_of_fullest(self._of("saved", mode))

    def passing(self, mode: Recompute) -> Any:
        return self._even.most_of_fullest(self._of("passing", mode))[:, None]

    def in_flight(self, of_stages: Any) -> Any:
        """What the fullest rank's microbatches add up to, of a figure of its stages."""
        return np.einsum("rs,rs->r", self._held, of_stages)[:, None]

    def again_s(self, at: Any, missing: Any, group: Any, trade: Trade) -> tuple[Any, Any]:
        """Seconds of recomputation of a mean rank and of any rank, at least, in the rows ``at``, whose fullest rank lacks so many bytes.

        Short stages recompute whole layers: f in full and those up to e selectively, where these spare enough; of a long one a fraction.
        """
        even, size, terms = self._even, self._even.row[at], self._table.terms
        held, most = self._held[at], even.most_layers[size]
        of_long = trade.again_s(-missing / held.sum(axis=1) / most, group) * even.layers[:, -1, size]
        selective, full = (each[group] for each in terms.layer_seconds)
        spared, spared_full = (each[group] for each in terms.layer_bytes)
        layers = [even.layers[:, number, size] for number in range(COUNTED_LAYERS + 1)]
        kept = [np.einsum("rs,rs->r", held, of_stages[size]) for of_stages in even.layers_of_fullest[:-1]]
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
        return self.state + self.in_flight(self.saved(mode)) + self.passing(mode)
