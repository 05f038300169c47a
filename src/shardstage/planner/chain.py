"""``Chain``: seconds and bytes of any run of a profile's units as a pipeline stage, from sums made once.

The figures are those of ``cost.step`` and ``cost.memory``, of which a search asks for thousands of runs: sums over units are differences of
prefix sums, and the largest of a run is the largest of the few kinds of unit in it.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np

from shardstage.cost.accounting import OUR_ACCOUNTING
from shardstage.cost.links import Links, exposed_s
from shardstage.cost.memory import GATHERED_UNITS, MOMENTS
from shardstage.cost.profile import RECOMPUTES, Profile, UnitCost
from shardstage.cost.setup import StepSetup
from shardstage.cost.stages import Gathered, zero_talk_s
from shardstage.graph.recompute import Recompute, StageRecompute
from shardstage.planner.recompute import Layers, Least
from shardstage.planner.stages import Fitted

__all__ = ["Chain", "ChainCosts", "ShardingWaits", "state_bytes_of"]


class Chain:
    """Sums over the units of one profile: the same for all choices of a group.

    ``kinds`` are its different units and ``twins`` the kind of each; by default every unit is of its own kind. ``layers`` names the layer
    that each belongs to; by default every unit is one. ``summed`` counts what units share with others as often as they use it.
    """

    def __init__(
        self,
        profile: Profile,
        kinds: Sequence[UnitCost] = (),
        twins: Sequence[int] | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        units = profile.units
        self.profile = profile
        self.num_units = len(units)
        self.kinds = kinds or units
        self._twins = np.arange(len(units)) if twins is None else np.asarray(twins)
        self.forward_s = self._sums(unit.forward_s + unit.talk_s(forward=True) for unit in self.kinds)
        self.backward_s = self._sums(unit.backward_s + unit.talk_s(forward=False) for unit in self.kinds)
        self.weight_s = self._sums(unit.weight_s for unit in self.kinds)
        self.recompute_s: dict[Recompute, list[float]] = {
            m: self._sums(u.kept[m].recompute_s for u in self.kinds) for m in RECOMPUTES
        }
        self.saved: dict[Recompute, list[float]] = {
            m: self._sums(u.kept[m].saved_bytes for u in self.kinds) for m in RECOMPUTES
        }
        self.own = self._sums(unit.own_elements for unit in self.kinds)
        self.summed = self._sums(
            unit.own_elements + sum(profile.shared_elements[name] for name in unit.shared)
            for unit in self.kinds
        )
        self.experts = self._sums(unit.expert_elements for unit in self.kinds)
        self.received = [unit.input_bytes for unit in units]
        self.slowest_unit_s = max(
            unit.forward_s + unit.backward_s + unit.talk_s(forward=True) + unit.talk_s(forward=False)
            for unit in self.kinds
        )
        self.both_s = [f + b for f, b in zip(self.forward_s, self.backward_s, strict=True)]
        self._shared = [(i, name) for i, unit in enumerate(units) for name in unit.shared]
        self._sharing = [i for i, _ in self._shared]
        self._together: dict[tuple[int, int], tuple[int, dict[int, int]]] = {}
        self._passing_of: dict[Recompute, list[tuple[int, list[int]]]] = {}
        self._largest: dict[tuple[int, int], list[int]] = {}
        self._layers_of_units = range(len(units)) if layers is None else layers
        self.layers = Layers(self._layers_of_units, self.saved, self.recompute_s, self.most_passing)

    @cached_property
    def _following(self) -> list[list[int]]:
        """[kind, unit]: the first unit of a kind from a unit on, or one beyond all."""
        found = []
        for kind in range(len(self.kinds)):
            places = np.where(self._twins == kind, np.arange(self.num_units), self.num_units)
            found.append(np.minimum.accumulate(places[::-1])[::-1].tolist())
        return found

    @cached_property
    def _repeats(self) -> tuple[list[int], list[int]]:
        """[unit]: where a run of equal units begins, each a layer by itself, and where it ends; any other unit is alone."""
        layers, twins = self._layers_of_units, self._twins
        around = zip((-1, *layers[:-1]), layers, (*layers[1:], -1), strict=True)
        is_layer = [before != layer != after for before, layer, after in around]
        begins, ends = [*range(self.num_units)], [*range(1, self.num_units + 1)]
        repeats = [
            unit
            for unit in range(1, self.num_units)
            if twins[unit] == twins[unit - 1] and is_layer[unit - 1] and is_layer[unit]
        ]
        for unit in repeats:
            begins[unit] = begins[unit - 1]
        for unit in reversed(repeats):
            ends[unit - 1] = ends[unit]
        return begins, ends

    def first_alike(self, start: int, stop: int) -> tuple[int, int]:
        """The first run of units that equals this one, and is followed by an equal unit."""
        begins, ends = self._repeats
        if stop >= ends[start]:
            return start, stop
        return begins[start], begins[start] + stop - start

    def _sums(self, of_kinds: Iterable[float]) -> list[float]:
        """What the units before each one add up to, and all."""
        each = np.array(list(of_kinds))
        sums: list[float] = [0.0, *each[self._twins].cumsum().tolist()]
        return sums

    def most_passing(self, mode: Recompute, start: int, stop: int) -> int:
        """The most that a unit of a run brings back and works with."""
        if mode not in self._passing_of:
            each = [unit.kept[mode].extra_bytes + unit.transient_bytes for unit in self.kinds]
            largest = sorted(range(len(each)), key=each.__getitem__, reverse=True)
            self._passing_of[mode] = [(each[kind], self._following[kind]) for kind in largest]
        return next(most for most, following in self._passing_of[mode] if following[start] < stop)

    def largest_units(self, start: int, stop: int) -> list[int]:
        """Elements of the largest units of a run, as many as ZeRO-3 has gathered at once."""
        if (start, stop) not in self._largest:
            sizes = sorted((u.own_elements for u in self.profile.units[start:stop]), reverse=True)
            self._largest[start, stop] = sizes[:GATHERED_UNITS]
        return self._largest[start, stop]

    def shared_elements(self, start: int, stop: int) -> int:
        """Elements of parameters that a run shares with other units, each once."""
        if bisect_left(self._sharing, start) == bisect_left(self._sharing, stop):
            return 0
        names = {name for i, name in self._shared if start <= i < stop}
        return sum(self.profile.shared_elements[name] for name in names)

    def gathered_together(self, start: int, stop: int) -> tuple[int, dict[int, int]]:
        """Of these, elements that several units of the run use, which ZeRO-2/3 gathers once a step; and those that go with one unit, by
        unit (``cost.stages``)."""
        span = bisect_left(self._sharing, start), bisect_left(self._sharing, stop)
        if span not in self._together:
            inside, sizes = self._shared[slice(*span)], self.profile.shared_elements
            uses, alone = Counter(name for _, name in inside), Counter[int]()
            for unit, name in inside:
                alone[unit] += sizes[name] if uses[name] == 1 else 0
            several = sum(sizes[name] for name, number in uses.items() if number > 1)
            self._together[span] = several, {unit: elements for unit, elements in alone.items() if elements}
        return self._together[span]


class ShardingWaits:
    """Seconds that ZeRO-2/3 adds to a run of units for each microbatch, in ``cost.step``'s way."""

    def __init__(self, chain: Chain, setup: StepSetup, links: Links) -> None:
        self._chain, self._setup, self._links = chain, setup, links
        units = [Gathered(unit.own_elements, unit.expert_elements) for unit in chain.profile.units]
        self._gather, self._scatter = self._talk_s(units)
        self._gathers, self._scatters = ([0.0, *accumulate(each)] for each in (self._gather, self._scatter))
        self._first_gathered = list(range(len(units) + 1))  # from each unit on
        for unit in reversed(range(len(units))):
            if not self._gather[unit]:
                self._first_gathered[unit] = self._first_gathered[unit + 1]
        self._slowdown = links.overlap_slowdown
        self._known: dict[tuple[int | None, int], tuple[float, float]] = {}

    def __call__(self, start: int, stop: int, again_s: float) -> float:
        """Of a run that recomputes for so long."""
        several, alone = self._chain.gathered_together(start, stop)
        first_gathered = min((self._first_gathered[start], *alone))
        first = self._gather[first_gathered] if first_gathered < stop else 0.0, self._scatter[start]
        more = 0.0, 0.0
        if several:
            _, last_s = self._of_shared(None, several)
            first, more = (first[0], first[1] + last_s), (0.0, last_s)
        for unit, elements in alone.items():
            gather_s, scatter_s = self._of_shared(unit, elements)
            more = more[0] + gather_s, more[1] + scatter_s
            first = first[0] + gather_s * (unit == first_gathered), first[1] + scatter_s * (unit == start)
        return self._exposed_s(start, stop, again_s, first, more)

    def _of_shared(self, unit: int | None, elements: int) -> tuple[float, float]:
        """The gather and the sum of elements that units share, by themselves, or what they add to those of one unit."""
        key = unit, elements
        if key not in self._known:
            if unit is None:
                (gather_s,), (scatter_s,) = self._talk_s([Gathered(elements)])
            else:
                of = self._chain.profile.units[unit]
                gathered = [Gathered(of.own_elements + elements, of.expert_elements)]
                (gather_s,), (scatter_s,) = self._talk_s(gathered)
                gather_s, scatter_s = gather_s - self._gather[unit], scatter_s - self._scatter[unit]
            self._known[key] = gather_s, scatter_s
        return self._known[key]

    def _talk_s(self, gathered: Sequence[Gathered]) -> tuple[list[float], list[float]]:
        """Gathers, which ZeRO-2 does once a step instead, and sums of gradients."""
        gathers, sums = zero_talk_s(gathered, self._setup, self._links)
        return ([0.0] * len(gathers) if self._setup.sharding_level == 2 else gathers), sums

    @property
    def least_s(self) -> float:
        """Of all stages together, but for their first gathers and sums: at least as if they were one, by convexity."""
        return self._exposed_s(0, self._chain.num_units, 0.0, (0.0, 0.0), (0.0, 0.0))

    def _exposed_s(
        self, start: int, stop: int, again_s: float, first: tuple[float, float], more: tuple[float, float]
    ) -> float:
        """``first`` of the gathers and of the sums nothing hides; ``more`` are of what other units share with these."""
        chain, slowdown = self._chain, self._slowdown
        gathered = self._gathers[stop] - self._gathers[start] + more[0]
        scattered = self._scatters[stop] - self._scatters[start] + more[1]
        forward_s = chain.forward_s[stop] - chain.forward_s[start]
        backward_s = chain.backward_s[stop] - chain.backward_s[start] + again_s
        return exposed_s(gathered, forward_s, slowdown, first[0]) + exposed_s(
            gathered + scattered, backward_s, slowdown, first[1]
        )


class ChainCosts:
    """The runs of a chain under one setup with one stage a rank: what ``best_cut`` asks.

    ``waits_s`` (start, stop, seconds of recomputation) are the seconds that ZeRO-2/3 adds to a run for each microbatch, ``accumulation_s``
    those of adding one element's gradient. Every stage recomputes what is ``asked``, or the least that it must to fit.
    """

    def __init__(
        self,
        chain: Chain,
        setup: StepSetup,
        limit_bytes: int,
        accumulation_s: float,
        waits_s: ShardingWaits | None = None,
        asked: StageRecompute | None = None,
    ) -> None:
        self.chain = chain
        self.limit_bytes = limit_bytes
        self.num_units = chain.num_units
        self._accumulation_s = accumulation_s
        self._expert_ratio = (
            setup.num_shards / setup.expert_shards if setup.sharding_level >= 2 else 1.0
        )  # of an expert's elements a rank adds up so many times the part that it does of others
        self._waits_s = waits_s
        self._in_flight = [setup.in_flight(stage) for stage in range(setup.mesh.pp)]
        self._state_bytes = state_bytes_of(chain, setup)
        self._asked = asked
        self._known: dict[tuple[int, bool, int, int], Fitted | None] = {}

    @property
    def has_unlike_stages(self) -> bool:
        return False

    @property
    def least_total_s(self) -> float:
        """What all stages take together at least."""
        return self._sums_s[-1] + (0.0 if self._waits_s is None else self._waits_s.least_s)

    def least_slowest_s(self, num_stages: int) -> float:
        """What the slowest takes at least: the mean, and the heaviest unit, whose own waiting others may hide."""
        heaviest_s = max(after - before for before, after in pairwise(self._sums_s))
        return max(heaviest_s, self.least_total_s / num_stages)

    def has_cut(self, num_stages: int, most_s: float) -> bool:
        """Whether so many stages can hold all units if each takes so long at most, all waiting and recomputation left out."""
        if most_s == math.inf:
            return True
        stop, sums_s = 0, self._sums_s
        for _ in range(num_stages):
            stop = max(bisect_right(sums_s, sums_s[stop] + most_s * (1 + 1e-9)) - 1, stop)
            if stop == self.num_units:
                return True
        return False

    @cached_property
    def _sums_s(self) -> list[float]:
        """Seconds of the units before each one, with adding up the gradients of their own parameters."""
        both_s, own, element_s = self.chain.both_s, self.chain.own, self._accumulation_s
        return [seconds + element_s * elements for seconds, elements in zip(both_s, own, strict=True)]

    def plain_s(self, stage: int, start: int, stop: int) -> float:
        layers = self.chain.layers
        again_s = 0.0 if self._asked is None else layers.again_s(layers.runs(self._asked, start, stop))
        return self._seconds(start, stop, again_s)

    def fitted(self, stage: int, start: int, stop: int) -> Fitted | None:
        start, stop = self.chain.first_alike(start, stop)
        key = (self._in_flight[stage], stage > 0, start, stop)
        if key not in self._known:
            least = self._least(stage, start, stop)
            self._known[key] = least and Fitted(self._seconds(start, stop, least.again_s), least.recompute)
        return self._known[key]

    def _seconds(self, start: int, stop: int, again_s: float) -> float:
        """Of a run that recomputes for so long."""
        chain = self.chain
        seconds = chain.both_s[stop] - chain.both_s[start] + again_s
        if self._accumulation_s:
            elements = chain.own[stop] - chain.own[start] + chain.shared_elements(start, stop)
            if self._expert_ratio != 1:
                elements += (self._expert_ratio - 1) * (chain.experts[stop] - chain.experts[start])
            seconds += self._accumulation_s * elements
        if self._waits_s is not None:
            seconds += self._waits_s(start, stop, again_s)
        return seconds

    def _least(self, stage: int, start: int, stop: int) -> Least | None:
        """The least recomputation that fits, by ``cost.memory.stage_memory`` of the run or at most a posted receive more."""
        chain, held = self.chain, self._in_flight[stage]
        received = chain.received[start] if stage else 0
        posted = received + (chain.received[stop] if stop < chain.num_units else 0)
        room_bytes = (
            self.limit_bytes
            - self._state_bytes(start, stop)
            - held * received
            - OUR_ACCOUNTING.num_posted_receives * posted
        )
        if self._asked is None:
            return chain.layers.least(start, stop, held, room_bytes)
        runs = chain.layers.runs(self._asked, start, stop)
        fits = held * chain.layers.kept_bytes(runs) + chain.layers.passing_bytes(runs) <= room_bytes
        return Least(self._asked, chain.layers.again_s(runs)) if fits else None


def state_bytes_of(chain: Chain, setup: StepSetup) -> Callable[[int, int], float]:
    """Parameters, gradients and optimizer state of a run: ``cost.memory``'s table."""
    level, c, g, w = setup.sharding_level, setup.compute_bytes, setup.gradient_bytes, setup.master_bytes
    own, experts, bucket_bytes = chain.own, chain.experts, setup.bucket_bytes
    of_master = w if level >= 2 or setup.has_own_masters else 0
    of_owned = 0 if setup.is_offloaded else of_master + MOMENTS * w
    of_owned += g if level >= 2 else 0
    of_owned += g if level >= 2 and setup.has_own_masters else 0

    shards = setup.num_shards if level else 1
    expert_shards = setup.expert_shards

    def owned(elements: float, of_experts: float) -> float:
        return -(-(elements - of_experts) // shards) + -(-of_experts // expert_shards)

    def replicated(start: int, stop: int) -> float:
        elements = own[stop] - own[start] + chain.shared_elements(start, stop)
        of_experts = experts[stop] - experts[start]
        part = owned(elements, of_experts)
        reduced = part - (of_experts if expert_shards == 1 else 0)  # ``StepSetup.reduced_elements``
        bucket = min(bucket_bytes, elements * c) // shards if level else 0
        return elements * (c + g) + part * of_owned + (reduced * g if level else 0) + bucket

    def sharded(start: int, stop: int) -> float:
        shared = chain.shared_elements(start, stop)
        elements = own[stop] - own[start] + shared
        part = owned(elements, experts[stop] - experts[start])
        sizes = chain.largest_units(start, stop)
        whole = elements if level == 2 else min(elements, sum(sizes) + shared)
        return whole * c + part * of_owned + max(sizes[0], shared) * (c + g)

    return sharded if level >= 2 else replicated
