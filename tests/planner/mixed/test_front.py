"""Time against memory over several classes: nothing on the front is undercut, and its points are what searches find."""

from __future__ import annotations

import math
from itertools import pairwise
from random import Random

import pytest
from tests.planner.mixed.instances import CLOSE, GRAPH, PLENTY, machines, random_searcher, searcher_of

from shardstage.errors import PlanError
from shardstage.plan import Request
from shardstage.planner import MixedSearcher, mixed_front, predict_mixed

CLUSTER = machines((2, 1.0), (2, 2.0))


def limits(searcher: MixedSearcher) -> list[int]:
    return [PLENTY] * len(searcher.cluster.parts)


@pytest.mark.parametrize("seed", range(10))
def test_no_point_is_undercut_and_the_first_is_the_best(seed: int) -> None:
    searcher = random_searcher(Random(seed))
    try:
        found = searcher.best(limits(searcher))
    except PlanError:
        return
    points = mixed_front(searcher, found)
    assert points[0].prediction.step_time_s == found.prediction.step_time_s
    for faster, smaller in pairwise(points):
        assert smaller.prediction.step_time_s > faster.prediction.step_time_s
        assert smaller.fill_ratio < faster.fill_ratio
    for point in points:
        shares = [peak / there for peak, there in zip(point.class_peaks, searcher.capacities, strict=True)]
        assert point.fill_ratio == max(shares)


@pytest.mark.parametrize("pp", [1, 2, 4])
def test_points_are_those_of_searches_within_their_shares(pp: int) -> None:
    """Single changes from point to point may miss a plan; where few decisions are open they do not."""
    fixed = frozenset({"pp", "microbatch"})
    searcher = searcher_of(CLUSTER, fix=Request(pp=pp, microbatch=2), fixed=fixed)
    points = mixed_front(searcher, searcher.best(limits(searcher)))
    assert len(points) >= 3
    for point in points:
        within = [math.ceil(point.fill_ratio * capacity) for capacity in searcher.capacities]
        again = searcher.best(within)
        assert again.prediction.step_time_s == pytest.approx(point.prediction.step_time_s, rel=1e-9)


def test_every_point_is_a_plan_with_its_own_price() -> None:
    searcher = searcher_of(CLUSTER, fix=Request(tp=1), fixed=frozenset({"tp"}), is_runnable=True)
    for point in mixed_front(searcher, searcher.best(limits(searcher))):
        again = predict_mixed(GRAPH, point.plan, CLUSTER, units=searcher.pricing.folded.starts)
        assert again.step_time_s == pytest.approx(point.prediction.step_time_s, rel=1e-9)
        assert again.peak_bytes == max(point.class_peaks) == point.prediction.peak_bytes


def test_no_point_takes_more_than_a_search_was_allowed() -> None:
    searcher = searcher_of(CLUSTER)
    most = max(share.peak_bytes for share in searcher.best(limits(searcher)).shares)
    found = searcher.best([int(0.9 * most), int(0.7 * most)])
    points = mixed_front(searcher, found)
    assert all(
        peak <= limit for point in points for peak, limit in zip(point.class_peaks, found.limits, strict=True)
    )
    assert all(point.prediction.step_time_s * CLOSE >= found.prediction.step_time_s for point in points)
