"""``find_period``: where a row repeats itself microbatch by microbatch, so that most of its steady state need not be simulated.

    1F1B, rank 1 of 4     F0 F1 │ F2 B0 │ F3 B1 │ F4 B2 │ … │ F9 B7 │ B8 B9
                                  start   length 2, shift 1, count 8

If R periods are left out of every row, what is left is the same schedule with fewer microbatches. Once each period of every lane begins
a constant λ after the one before, for as many periods as instructions depend on each other, all that follows does: times are maxima of sums
(Baccelli, Cohen, Olsder, Quadrat, "Synchronization and Linearity", 1992, §3.7). So the step takes R λ longer than the one simulated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter, sub
from typing import Final

import numpy as np
import numpy.typing as npt

from shardstage.program import Instruction

__all__ = ["STEADY_PERIODS", "Cut", "Period", "cut_rows", "find_period", "steady_s"]

STEADY_PERIODS: Final = 3
"""How many periods before and behind a cut must be λ apart: what a rank waits for lies at most two periods away."""

_TOLERANCE: Final = 1e-9
_MAX_CANDIDATES: Final = 64

_Integers = npt.NDArray[np.int_]

_key_of = attrgetter("stage", "kind", "peer", "message", "calls")
_microbatch_of = attrgetter("microbatch")


@dataclass(frozen=True, kw_only=True, slots=True)
class Period:
    """``row[start + i + length]`` is ``row[start + i]`` of a microbatch ``shift`` later, for ``count`` periods of ``length``."""

    start: int
    length: int
    count: int
    shift: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """What is left out of a row: ``num_periods`` periods from instruction ``at`` on, ``num_microbatches`` of them."""

    at: int
    length: int
    num_periods: int
    num_microbatches: int

    @property
    def stop(self) -> int:
        return self.at + self.num_periods * self.length


def find_period(row: Sequence[Instruction], sizes: Sequence[int]) -> Period | None:
    """The longest periodic run around the middle of a row; ``None`` where there is none. ``sizes`` are those of its microbatches."""
    known: dict[tuple[object, ...], int] = {}
    keys = [known.setdefault(key, len(known)) for key in map(_key_of, row)]
    numbers = [-1 if m is None else m for m in map(_microbatch_of, row)]
    at = middle = len(row) // 2
    for _ in range(_MAX_CANDIDATES):
        try:
            at = keys.index(keys[middle], at + 1)
        except ValueError:
            return None
        length, shift = at - middle, numbers[at] - numbers[middle]
        if shift > 0 and keys[middle:at] == keys[at : at + length]:
            found = _run_around(np.array(keys), np.array(numbers), sizes, middle, length, shift)
            if found is not None:
                return found
    return None


def _run_around(
    keys: _Integers, numbers: _Integers, sizes: Sequence[int], middle: int, length: int, shift: int
) -> Period | None:
    """The run of instructions that repeat ``length`` later, as whole periods of one size of microbatch."""
    later = numbers[length:]
    same = (keys[length:] == keys[:-length]) & (later - numbers[:-length] == shift)
    if len(set(sizes)) > 1:
        by_number = np.array([*sizes, 0])  # -1, of what is for all microbatches, finds the 0
        same &= by_number[later] == by_number[numbers[:-length]]
    others = np.flatnonzero(~same)
    place = int(np.searchsorted(others, middle))
    start = int(others[place - 1]) + 1 if place else 0
    stop = int(others[place]) if place < len(others) else len(same)
    count = (stop - start) // length + 1
    return Period(start=start, length=length, count=count, shift=shift) if count > 1 else None


def cut_rows(periods: Sequence[Period | None], num_kept: int) -> list[Cut] | None:
    """What to leave out so that the row with fewest periods keeps ``num_kept``; ``None`` if rows differ too much, or too little is left."""
    found = [period for period in periods if period is not None]
    if not found or len(found) < len(periods) or len({period.shift for period in found}) > 1:
        return None
    fewest = min(period.count for period in found)
    left_out = fewest - num_kept
    if left_out < 1:
        return None
    return [
        Cut(
            at=period.start + (period.count - left_out) // 2 * period.length,
            length=period.length,
            num_periods=left_out,
            num_microbatches=left_out * period.shift,
        )
        for period in found
    ]


def steady_s(ends_s: Sequence[Sequence[float]], cuts: Sequence[Cut]) -> float | None:
    """λ, if around the cuts every instruction of every row ends λ after that of the period before; else ``None``."""
    period_s: float | None = None
    for ends, cut in zip(ends_s, cuts, strict=True):
        first, last = cut.at - STEADY_PERIODS * cut.length, cut.at + (STEADY_PERIODS - 1) * cut.length
        steps = list(map(sub, ends[first + cut.length : last + cut.length], ends[first:last]))
        if period_s is None:
            period_s = steps[0]
        slack_s = _TOLERANCE * max(period_s, abs(ends[-1]))
        if max(steps) - period_s > slack_s or period_s - min(steps) > slack_s:
            return None
    return period_s
