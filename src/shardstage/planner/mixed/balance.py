"""``balanced_on``: cuts of several stages a rank over unlike classes, so that the slowest rank is as quick as can be.

T is a cap on the seconds of a rank, all its v stages together. From the last stage to the first, each takes as many units as leave its rank
within the part of the cap that is its stages' so far:

    Σ of the last k stages of a rank  <=  k / v × T

so that what one stage cannot use the rank's next one does. Where all units but the first and the last are alike, every rank thus takes all
that T lets it, and the least feasible T, step by step from cut to cut, is that of the best one; else T is found by bisection, and then
boundaries are moved for as long as that helps.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Final, NamedTuple

import numpy as np

__all__ = ["balanced_on"]

PRECISION: Final = 1e-4
"""Relative precision of the cap, where units are unlike."""

ALIKE: Final = 1e-6
"""Units whose seconds differ by less are alike."""

MOST_MOVES: Final = 64
"""So often boundaries move at most."""


def balanced_on(sums: Sequence[Sequence[float]], ranks: Sequence[int]) -> tuple[int, ...]:
    """First units of the stages. ``sums`` are for each stage the seconds of the units before each one on its class, ``ranks`` the one that
    runs it."""
    number = [0] * (max(ranks) + 1)
    for rank in ranks:
        number[rank] += 1
    classes = {id(own): own for own in sums}.values()
    unit_s = max(after - before for own in classes for before, after in pairwise(own))
    low = 1 / sum(1 / sums[ranks.index(rank)][-1] for rank in range(len(number)))
    best, high = None, low
    while best is None:
        high += unit_s
        best = _within(sums, ranks, number, high)
    if _are_alike(sums[0]):
        while (cut := _within(sums, ranks, number, best.slowest_s * (1 - 1e-8))) is not None:
            best = cut
        return best.starts
    while best.slowest_s - low > PRECISION * low:
        middle = (low + best.slowest_s) / 2
        cut = _within(sums, ranks, number, middle)
        if cut is None:
            low = middle
        else:
            best = cut
    return _moved(sums, ranks, best.starts)


class _Cut(NamedTuple):
    """First units of the stages, and the slowest rank's seconds."""

    starts: tuple[int, ...]
    slowest_s: float


def _within(
    sums: Sequence[Sequence[float]], ranks: Sequence[int], number: Sequence[int], cap: float
) -> _Cut | None:
    """The cut that the caps lead to; None where a rank takes longer."""
    used, seen = [0.0] * len(number), [0] * len(number)
    stop, starts, first_rank = len(sums[0]) - 1, [0] * len(sums), ranks[0]
    first_s = sums[0][1]
    for stage in range(len(sums) - 1, 0, -1):
        own, rank = sums[stage], ranks[stage]
        seen[rank] += 1
        budget = cap * seen[rank] / number[rank] - used[rank]
        if rank == first_rank:  # the first stage has the first unit at least
            budget = min(budget, cap - used[rank] - first_s)
        start = bisect_left(own, own[stop] - budget * (1 + 1e-12))
        start = max(min(start, stop - 1), stage)
        used[rank] += own[stop] - own[start]
        if used[rank] > cap * (1 + 1e-9):
            return None
        starts[stage] = stop = start
    used[first_rank] += sums[0][stop]
    return _Cut(tuple(starts), max(used)) if used[first_rank] <= cap * (1 + 1e-9) else None


def _are_alike(own: Sequence[float]) -> bool:
    """Whether all units but the first and the last are."""
    each = np.diff(own)[1:-1]
    return not len(each) or bool(each.max() - each.min() <= ALIKE * each.max())


def _moved(sums: Sequence[Sequence[float]], ranks: Sequence[int], starts: tuple[int, ...]) -> tuple[int, ...]:
    """A cut that moving neighbouring boundaries by a unit makes no better: the slowest rank's seconds fall at each move."""
    places, of_rank, stages = np.array(starts), np.array(ranks), np.arange(len(sums))
    table = np.array(sums)
    each = np.diff(table, axis=1)  # [stage, unit]
    for _ in range(MOST_MOVES):
        stops = np.append(places[1:], table.shape[1] - 1)
        seconds = np.bincount(of_rank, table[stages, stops] - table[stages, places])
        least_s, best = seconds.max() * (1 - 1e-9), None
        for way in (1, -1):
            after = _slowest_after(each, of_rank, places, stops, seconds, way)
            first, last = np.unravel_index(after.argmin(), after.shape)
            if after[first, last] < least_s:
                least_s, best = after[first, last], (first, last, way)
        if best is None:
            break
        first, last, way = best
        places[first + 1 : last + 1] += way
    return tuple(places.tolist())


def _slowest_after(each: Any, of_rank: Any, places: Any, stops: Any, seconds: Any, way: int) -> Any:
    """[i, j]: the slowest rank's seconds once the starts of stages i + 1 to j lie a unit further, or before; infinite where one has none
    left."""
    stages, size = np.arange(1, len(places)), stops - places
    unit = places[1:] + min(way, 0)
    more = np.zeros((len(places), len(seconds)))  # [boundary, rank]
    np.add.at(more, (stages, of_rank[stages - 1]), way * each[stages - 1, unit])
    np.add.at(more, (stages, of_rank[stages]), -way * each[stages, unit])
    sums = more.cumsum(axis=0)
    first, last = np.indices((len(places), len(places)))
    is_left = size[last if way > 0 else first] > 1
    after = (seconds + sums[None] - sums[:, None]).max(axis=2)
    return np.where((last > first) & is_left, after, np.inf)
