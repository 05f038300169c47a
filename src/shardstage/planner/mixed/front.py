"""``mixed_front``: what less memory costs over several classes of devices.

Memory is the largest share of what a device of its class can hold that a rank does hold. Points are the best plans within some parts of
the best plan's share, and within the shares of what the search and ``mixed_alternatives`` priced, as far as single changes lead to
them from the best plan within a larger share: a search within the share (``--max-memory 70%``) may know a better one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Final

from shardstage.plan import shorthand
from shardstage.planner.found import pareto
from shardstage.planner.mixed.changes import changes
from shardstage.planner.mixed.priced import MixedPriced, TooLong
from shardstage.planner.mixed.search import MixedResult, MixedSearcher
from shardstage.planner.mixed.space import MixedChoice
from shardstage.planner.told import Point

__all__ = ["best_near", "mixed_front"]

PARTS: Final = (0.75, 0.5, 0.25)
"""Of the share that the best plan holds."""

MOST_STEPS: Final = 2
"""So many changes lead at most from the best plan within a share to that within the next."""


def mixed_front(searcher: MixedSearcher, found: MixedResult) -> tuple[Point, ...]:
    """Of all plans that were priced those that nothing faster undercuts, fastest first."""
    searcher.use(found.savers)
    best, capacities = found.priced, searcher.capacities
    most = best.fill_ratio(capacities)

    def share_of(priced: MixedPriced) -> float:
        return priced.fill_ratio(capacities)

    points = pareto([*found.fitting, *_changed(searcher, best, found.limits)], share_of)
    for share in sorted({*(part * most for part in PARTS), *map(share_of, points[1:])}, reverse=True):
        smaller = min((each for each in points if share_of(each) <= share), key=_seconds, default=best)
        starts = (best, smaller, *found.runners_up)
        within = [math.ceil(share * capacity) for capacity in capacities]
        best = best_near(searcher, starts, [*map(min, within, found.limits)]) or best
        points.append(best)
    return tuple(
        Point(
            plan=each.plan,
            text=shorthand(each.plan, default_precision=each.plan.precision),
            prediction=each.prediction,
            class_peaks=each.peaks,
            fill_ratio=share_of(each),
        )
        for each in pareto(points, share_of)
    )


def _seconds(priced: MixedPriced) -> float:
    return priced.seconds


def _changed(searcher: MixedSearcher, best: MixedPriced, limits: Sequence[int]) -> Iterator[MixedPriced]:
    """What ``mixed_alternatives`` priced, and fits."""
    for change in changes(searcher, best):
        pricing = searcher.pricing if change.recompute is None else searcher.pricing.asking(change.recompute)
        for choice in change.variants:
            priced = pricing.price(choice, limits, firsts=change.firsts)
            if priced is not None:
                yield priced


def best_near(
    searcher: MixedSearcher, starts: Sequence[MixedPriced], limits: Sequence[int]
) -> MixedPriced | None:
    """The best plan within limits that is cut freely and a few changes away from the best of some."""
    best = _best_of(searcher, [start.choice for start in starts], limits, None)
    for _ in range(MOST_STEPS):
        around = [
            choice
            for change in changes(searcher, best or starts[0])
            for choice in change.variants
            if change.recompute is None and not change.firsts
        ]
        before, best = best, _best_of(searcher, around, limits, best)
        if best is before:
            break
    return best


def _best_of(
    searcher: MixedSearcher, choices: Sequence[MixedChoice], limits: Sequence[int], best: MixedPriced | None
) -> MixedPriced | None:
    for choice in choices:
        with suppress(TooLong):
            best = searcher.pricing.price(choice, limits, best.seconds if best else math.inf) or best
    return best
