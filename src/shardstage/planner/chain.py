"""``Chain``: seconds and bytes of any run of a profile's units as a pipeline stage, from sums made once.

The figures are those of ``cost.step`` and ``cost.memory``, of which a search asks for thousands of runs: sums over units are differences of
prefix sums, and the largest of a run is the largest of the few kinds of unit in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from shardstage.cost.memory import GATHERED_UNITS, MOMENTS, POSTED_RECEIVES
from shardstage.cost.profile import RECOMPUTES, Profile, Recompute, UnitCost
from shardstage.cost.setup import StepSetup

__all__ = ["Chain", "ChainCosts"]


class Chain:
    """Sums over the units of one profile: the same for all choices of a group."""

    def __init__(self, profile: Profile) -> None:
        units = profile.units
        self.profile = profile
        self.num_units = len(units)
        self.forward_s = _sums(unit.forward_s + unit.talk_s(forward=True) for unit in units)
        self.backward_s = _sums(unit.backward_s + unit.talk_s(forward=False) for unit in units)
        self.recompute_s = {m: _sums(unit.kept[m].recompute_s for unit in units) for m in RECOMPUTES}
        self.saved = {m: _sums(unit.kept[m].saved_bytes for unit in units) for m in RECOMPUTES}
        self.own = _sums(unit.own_elements for unit in units)
        self.experts = _sums(unit.expert_elements for unit in units)
        self.parameters = _sums(unit.num_parameters for unit in units)
        self.received = [unit.input_bytes for unit in units]
        self.slowest_unit_s = max(
            unit.forward_s + unit.backward_s + unit.talk_s(forward=True) + unit.talk_s(forward=False)
            for unit in units
        )
        kinds = list(dict.fromkeys(id(unit) for unit in units))
        by_kind = {id(unit): unit for unit in units}
        self._kinds = [by_kind[kind] for kind in kinds]
        self._counts = [_sums(id(unit) == kind for unit in units) for kind in kinds]
        self._shared = [(i, name) for i, unit in enumerate(units) for name in unit.shared]

    def kinds_in(self, start: int, stop: int) -> list[tuple[UnitCost, int]]:
        """Kinds of units within a run, with how many of each."""
        found = []
        for unit, counts in zip(self._kinds, self._counts, strict=True):
            if number := counts[stop] - counts[start]:
                found.append((unit, int(number)))
        return found

    def shared_elements(self, start: int, stop: int) -> int:
        """Elements of parameters that a run shares with other units, each once."""
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
    waits_s: Callable[[int, int], float] | None = None

    @property
    def num_units(self) -> int:
        return self.chain.num_units

    def seconds(self, stage: int, start: int, stop: int, mode: Recompute) -> float:
        chain = self.chain
        seconds = (
            chain.forward_s[stop]
            - chain.forward_s[start]
            + chain.backward_s[stop]
            - chain.backward_s[start]
            + chain.recompute_s[mode][stop]
            - chain.recompute_s[mode][start]
        )
        if self.accumulation_s:
            seconds += self.accumulation_s * (
                chain.own[stop] - chain.own[start] + chain.shared_elements(start, stop)
            )
        if self.waits_s is not None:
            seconds += self.waits_s(start, stop)
        return seconds

    def fits(self, stage: int, start: int, stop: int, mode: Recompute) -> bool:
        return self.peak_bytes(stage, start, stop, mode) <= self.limit_bytes

    def peak_bytes(self, stage: int, start: int, stop: int, mode: Recompute) -> float:
        """``cost.memory.stage_memory`` of the run, at most a posted receive more."""
        chain, setup = self.chain, self.setup
        kinds = chain.kinds_in(start, stop)
        shared = chain.shared_elements(start, stop)
        elements = chain.own[stop] - chain.own[start] + shared
        part = setup.part_elements(int(elements), int(chain.experts[stop] - chain.experts[start]))
        level, c, w = setup.sharding_level, setup.compute_bytes, setup.master_bytes
        if level >= 2:
            sizes = sorted(
                (u.own_elements for u, number in kinds for _ in range(min(number, GATHERED_UNITS))),
                reverse=True,
            )
            largest = max(sizes[0], shared)
            whole = elements if level == 2 else min(elements, sum(sizes[:GATHERED_UNITS]) + shared)
            gradients = part * w + largest * (c + w)
        else:
            whole, gradients = elements, elements * w + (part * w if level else 0)
        received = chain.received[start] if stage else 0
        kept = chain.saved[mode][stop] - chain.saved[mode][start] + received
        passing = max(unit.kept[mode].extra_bytes + unit.transient_bytes for unit, _ in kinds)
        posted = POSTED_RECEIVES * (received + (chain.received[stop] if stop < chain.num_units else 0))
        bucket = min(setup.bucket_bytes, elements * c) // setup.num_shards if level == 1 else 0
        return (
            whole * c
            + (part * w if level >= 2 or c != w else 0)
            + gradients
            + MOMENTS * part * w
            + self._in_flight(stage) * kept
            + passing
            + posted
            + bucket
        )

    def _in_flight(self, stage: int) -> int:
        setup = self.setup
        if setup.schedule == "gpipe":
            return setup.num_microbatches
        return min(setup.mesh.pp - stage, setup.num_microbatches)


def _sums(values: Sequence[float] | object) -> list[float]:
    return [0.0, *accumulate(values)]  # type: ignore[arg-type]
