"""``balanced``: consecutive units cut into stages so that the slowest stage is as fast as can be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

__all__ = ["balanced", "slowest"]


def balanced(weights: Sequence[float], num_stages: int) -> tuple[int, ...]:
    """First unit of each stage; every stage gets at least one unit.

    Minimises first the heaviest stage, then the sum of squares, by dynamic programming over (stage, first units) in
    O(num_stages × units²); exact.

        best(s, j) = min over i < j of  best(s - 1, i) ⊕ weight(i .. j)     ⊕ on (heaviest, sum of squares)
    """
    total = (0.0, *accumulate(weights))
    num_units = len(weights)
    if not 1 <= num_stages <= num_units:
        raise ValueError(f"{num_units} units cannot make {num_stages} stages")
    best: list[tuple[float, float]] = [(w, w * w) for w in total]
    cuts: list[list[int]] = []
    for stage in range(1, num_stages):
        row: list[tuple[float, float]] = [(math.inf, math.inf)] * (num_units + 1)
        came_from = [0] * (num_units + 1)
        for stop in range(stage + 1, num_units + 1):
            for start in range(stop - 1, stage - 1, -1):
                weight = total[stop] - total[start]
                if weight > row[stop][0]:
                    break  # an earlier start only makes this stage heavier
                heaviest, squares = best[start]
                found = (max(heaviest, weight), squares + weight * weight)
                if found < row[stop]:
                    row[stop], came_from[stop] = found, start
        best = row
        cuts.append(came_from)
    starts = [num_units]
    for came_from in reversed(cuts):
        starts.append(came_from[starts[-1]])
    return (0, *reversed(starts[1:]))


def slowest(weights: Sequence[float], starts: Sequence[int]) -> float:
    """Weight of the heaviest stage."""
    stops = (*starts[1:], len(weights))
    return max(sum(weights[start:stop]) for start, stop in zip(starts, stops, strict=True))
