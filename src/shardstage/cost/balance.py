"""``balanced``: consecutive units cut into stages so that the slowest stage is as fast as can be."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Final

__all__ = ["balanced", "slowest"]

CAP_PRECISION: Final = 1e-9
"""Relative precision to which the lightest heaviest stage is found."""


def balanced(weights: Sequence[float], num_stages: int) -> tuple[int, ...]:
    """First unit of each stage; every stage gets at least one unit.

    Minimises the heaviest stage (a parametric search, each probe greedy in O(stages log units)), and among those cuts the sum of squares,
    by dynamic programming over (stage, first units):

        squares(s, j) = min over i < j with weight(i .. j) <= heaviest of  squares(s - 1, i) + weight(i .. j)²
    """
    num_units = len(weights)
    if not 1 <= num_stages <= num_units:
        raise ValueError(f"{num_units} units cannot make {num_stages} stages")
    total = (0.0, *accumulate(weights))
    cap = _lightest_heaviest(weights, total, num_stages)
    best = [0.0] + [math.inf] * num_units
    cuts = []
    for stage in range(1, num_stages + 1):
        row, came_from = [math.inf] * (num_units + 1), [0] * (num_units + 1)
        for stop in range(stage, num_units - (num_stages - stage) + 1):
            for start in range(stop - 1, stage - 2, -1):
                weight = total[stop] - total[start]
                if weight > cap:
                    break  # an earlier start only makes this stage heavier
                squares = best[start] + weight * weight
                if (
                    squares <= row[stop]
                ):  # of equal cuts, the first stages, which hold most activations, get fewer
                    row[stop], came_from[stop] = squares, start
        best = row
        cuts.append(came_from)
    starts = [num_units]
    for came_from in reversed(cuts):
        starts.append(came_from[starts[-1]])
    return tuple(reversed(starts[1:]))


def slowest(weights: Sequence[float], starts: Sequence[int]) -> float:
    """Weight of the heaviest stage."""
    stops = (*starts[1:], len(weights))
    return max(sum(weights[start:stop]) for start, stop in zip(starts, stops, strict=True))


def _lightest_heaviest(weights: Sequence[float], total: Sequence[float], num_stages: int) -> float:
    """The least weight that no stage need exceed, a little rounded up."""
    low, high = max(max(weights), total[-1] / num_stages), total[-1]
    while high - low > CAP_PRECISION * high:
        middle = (low + high) / 2
        if _num_stages_under(middle, total) <= num_stages:
            high = middle
        else:
            low = middle
    return high * (1 + CAP_PRECISION)


def _num_stages_under(cap: float, total: Sequence[float]) -> int:
    """How few stages do, none of them heavier than ``cap``; filled one after the other, each as far as it goes."""
    num_stages, start = 0, 0
    while start < len(total) - 1:
        stop = bisect_right(total, total[start] + cap * (1 + CAP_PRECISION)) - 1
        start = max(stop, start + 1)
        num_stages += 1
    return num_stages
