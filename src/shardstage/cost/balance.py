"""``balanced``: consecutive units cut into stages so that the slowest stage is as fast as can be."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Final

import numpy as np

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
    sums = np.array(total)
    earliest = np.array([bisect_left(total, total[stop] - cap) for stop in range(num_units + 1)])
    width = int((np.arange(num_units + 1) - earliest).max())
    # [stop, …]: the starts within reach of a stop, ascending; of equal cuts, the first stages, which hold most activations, get fewer
    stops = np.arange(num_units + 1)
    reach = stops[:, None] - np.arange(width, 0, -1)[None, :]
    weight = sums[:, None] - sums[np.maximum(reach, 0)]
    squares = np.where((reach >= 0) & (weight <= cap), weight * weight, np.inf)
    start, at = np.maximum(reach, 0), stops * width
    best = np.array([0.0] + [math.inf] * num_units)
    cuts = []
    for _ in range(num_stages):
        of_starts = best.take(start) + squares
        chosen = of_starts.argmin(axis=1)
        best = of_starts.take(at + chosen)
        cuts.append(chosen)
    starts = [num_units]
    for came_from in reversed(cuts):
        starts.append(starts[-1] - width + int(came_from[starts[-1]]))
    return tuple(reversed(starts[1:]))


def slowest(weights: Sequence[float], starts: Sequence[int]) -> float:
    """Weight of the heaviest stage."""
    stops = (*starts[1:], len(weights))
    return max(sum(weights[start:stop]) for start, stop in zip(starts, stops, strict=True))


def _lightest_heaviest(weights: Sequence[float], total: Sequence[float], num_stages: int) -> float:
    """The least weight that no stage need exceed, a little rounded up."""
    low = max(max(weights), total[-1] / num_stages)
    high = min(
        total[-1], total[-1] / num_stages + max(weights)
    )  # filling each stage past the mean by a unit is enough
    while high - low > CAP_PRECISION * high:
        lighter = _heaviest_under(high * (1 - 3 * CAP_PRECISION), total, num_stages)
        if lighter is None:
            break
        high = lighter
        middle = (low + high) / 2
        found = _heaviest_under(middle, total, num_stages)
        low, high = (middle, high) if found is None else (low, found)
    return high * (1 + CAP_PRECISION)


def _heaviest_under(cap: float, total: Sequence[float], num_stages: int) -> float | None:
    """The heaviest of ``num_stages`` stages, filled one after the other, each as far as ``cap`` allows; None where that is not enough."""
    heaviest, start = 0.0, 0
    for _ in range(num_stages):
        stop = max(bisect_right(total, total[start] + cap * (1 + CAP_PRECISION)) - 1, start + 1)
        heaviest = max(heaviest, total[stop] - total[start])
        start = stop
        if start == len(total) - 1:
            return heaviest
    return None
