"""``Chain``: seconds and bytes of any run of a profile's units as a pipeline stage, from sums made once.

The figures are those of ``cost.step`` and ``cost.memory``, of which a search asks for thousands of runs: sums over units are differences of
prefix sums, and the largest of a run is the largest of the few kinds of unit in it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from shardstage.cost.accounting import OUR_ACCOUNTING
from shardstage.cost.memory import GATHERED_UNITS, MOMENTS
from shardstage.cost.pipeline import SPLITTING
from shardstage.cost.profile import RECOMPUTES, Profile, Recompute, UnitCost
from shardstage.cost.setup import StepSetup

__all__ = ["Chain", "ChainCosts"]


class Chain:
    """Sums over the units of one profile: the same for all choices of a group.

    ``kinds`` are its different units and ``twins`` the kind of each; by default every unit is of its own kind.
    """

    def __init__(
        self, profile: Profile, kinds: Sequence[UnitCost] = (), twins: Sequence[int] | None = None
    ) -> None:
        units = profile.units
        self.profile = profile
        self.num_units = len(units)
        self.kinds = kinds or units
        self._twins = np.arange(len(units)) if twins is None else np.asarray(twins)
        self.forward_s = self._sums(unit.forward_s + unit.talk_s(forward=True) for unit in self.kinds)
        self.backward_s = self._sums(unit.backward_s + unit.talk_s(forward=False) for unit in self.kinds)
        self.recompute_s = {m: self._sums(u.kept[m].recompute_s for u in self.kinds) for m in RECOMPUTES}
        self.saved = {m: self._sums(u.kept[m].saved_bytes for u in self.kinds) for m in RECOMPUTES}
        self.own = self._sums(unit.own_elements for unit in self.kinds)
        self.experts = self._sums(unit.expert_elements for unit in self.kinds)
        self.received = [unit.input_bytes for unit in units]
        self.slowest_unit_s = max(
            unit.forward_s + unit.backward_s + unit.talk_s(forward=True) + unit.talk_s(forward=False)
            for unit in self.kinds
        )
        self.both_s = [f + b for f, b in zip(self.forward_s, self.backward_s, strict=True)]
        self._shared = [(i, name) for i, unit in enumerate(units) for name in unit.shared]
        self._sharing = [i for i, _ in self._shared]
        self._most: dict[tuple[Recompute, int], list[int]] = {}
        self._largest: dict[tuple[int, int], list[int]] = {}

    def _sums(self, of_kinds: Iterable[float]) -> list[float]:
        """What the units before each one add up to, and all."""
        each = np.array(list(of_kinds))
        sums: list[float] = [0.0, *each[self._twins].cumsum().tolist()]
        return sums

    def _passing(self, mode: Recompute) -> list[int]:
        each = np.array([unit.kept[mode].extra_bytes + unit.transient_bytes for unit in self.kinds])
        passing: list[int] = each[self._twins].tolist()
        return passing

    def most_passing(self, mode: Recompute, start: int, stop: int) -> int:
        """The most that a unit of a run brings back and works with."""
        if (mode, start) not in self._most:
            self._most[mode, start] = list(accumulate(self._passing(mode)[start:], max))
        return self._most[mode, start][stop - start - 1]

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


@dataclass(frozen=True)
class ChainCosts:
    """The runs of a chain under one setup with one stage a rank: what ``best_cut`` asks.

    ``waits_s`` are the seconds that ZeRO-2/3 adds to a run for each microbatch, ``accumulation_s`` those of adding one element's gradient.
    """

    chain: Chain
    setup: StepSetup
    limit_bytes: int
    accumulation_s: float
    waits_s: Callable[[int, int, Recompute], float] | None = None

    @property
    def num_units(self) -> int:
        return self.chain.num_units

    def seconds(self, stage: int, start: int, stop: int, mode: Recompute) -> float:
        chain = self.chain
        both, again = chain.both_s, chain.recompute_s[mode]
        seconds = both[stop] - both[start] + again[stop] - again[start]
        if self.accumulation_s:
            seconds += self.accumulation_s * (
                chain.own[stop] - chain.own[start] + chain.shared_elements(start, stop)
            )
        if self.waits_s is not None:
            seconds += self.waits_s(start, stop, mode)
        return seconds

    def fits(self, stage: int, start: int, stop: int, mode: Recompute) -> bool:
        return self.peak_bytes(stage, start, stop, mode) <= self.limit_bytes

    def peak_bytes(self, stage: int, start: int, stop: int, mode: Recompute) -> float:
        """``cost.memory.stage_memory`` of the run, at most a posted receive more."""
        chain = self.chain
        shared = chain.shared_elements(start, stop)
        elements = chain.own[stop] - chain.own[start] + shared
        received = chain.received[start] if stage else 0
        kept = chain.saved[mode][stop] - chain.saved[mode][start] + received
        posted = OUR_ACCOUNTING.num_posted_receives * (
            received + (chain.received[stop] if stop < chain.num_units else 0)
        )
        return (
            self._state_bytes(start, stop, elements, shared)
            + self._in_flight(stage) * kept
            + chain.most_passing(mode, start, stop)
            + posted
        )

    def _state_bytes(self, start: int, stop: int, elements: float, shared: int) -> float:
        """Parameters, gradients and optimizer state of a run."""
        chain, setup = self.chain, self.setup
        part = setup.part_elements(int(elements), int(chain.experts[stop] - chain.experts[start]))
        level, c, g, w = (
            setup.sharding_level,
            setup.compute_bytes,
            setup.gradient_bytes,
            setup.master_bytes,
        )
        is_apart = setup.has_own_masters
        state = 0 if setup.is_offloaded else (MOMENTS + (level >= 2 or is_apart)) * part * w
        if level < 2:
            bucket = min(setup.bucket_bytes, elements * c) // setup.num_shards if level == 1 else 0
            return elements * c + elements * g + (part * g if level else 0) + state + bucket
        sizes = chain.largest_units(start, stop)
        largest = max(sizes[0], shared)
        whole = elements if level == 2 else min(elements, sum(sizes) + shared)
        return whole * c + (part * g if is_apart else 0) + part * g + largest * (c + g) + state

    def _in_flight(self, stage: int) -> int:
        setup = self.setup
        if setup.schedule == "gpipe":
            return setup.num_microbatches
        behind = (
            0 if setup.schedule in SPLITTING else stage
        )  # what waits for its W is held as long as on the first rank
        return min(setup.mesh.pp - behind, setup.num_microbatches)
