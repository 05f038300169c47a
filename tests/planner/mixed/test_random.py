"""Random small mixed clusters: the search finds what pricing every choice finds, and no bound is above its price."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from tests.planner.mixed.instances import CLOSE, PLENTY, all_priced, random_searcher, random_sharing_searcher

from shardstage.errors import PlanError
from shardstage.planner import predict
from shardstage.planner.mixed.priced import MixedPriced
from shardstage.planner.mixed.search import MixedSearcher
from shardstage.planner.mixed.space import MixedChoice

Prices = dict[MixedChoice, MixedPriced | None]


@pytest.mark.parametrize("seed", range(10))
def test_the_best_of_a_random_space_is_found_within_any_memory(seed: int) -> None:
    random = Random(seed)
    searcher = random_searcher(random)
    num_classes = len(searcher.cluster.parts)
    try:
        most = searcher.best((PLENTY,) * num_classes)
    except PlanError:
        assert all(price is None for price in all_priced(searcher, (PLENTY,) * num_classes).values())
        return
    for _ in range(2):
        limits = tuple(
            int(random.uniform(0.2, 1.1) * max(share.peak_bytes for share in most.shares))
            for _ in range(num_classes)
        )
        for each in ((PLENTY,) * num_classes, limits):
            assert_best(searcher, each)


@pytest.mark.parametrize("seed", range(8))
def test_the_best_of_random_ways_to_share_sequences_and_experts_is_found(seed: int) -> None:
    random = Random(500 + seed)
    searcher = random_sharing_searcher(random)
    most = max(
        (max(price.peaks) for price in all_priced(searcher, (PLENTY, PLENTY)).values() if price is not None),
        default=PLENTY,
    )
    for limits in ((PLENTY, PLENTY), tuple(int(random.uniform(0.1, 0.9) * most) for _ in range(2))):
        assert_best(searcher, limits)


def assert_best(searcher: MixedSearcher, limits: tuple[int, ...]) -> None:
    prices = all_priced(searcher, limits)
    fitting = [price for price in prices.values() if price is not None]
    assert_bounds_are_below(searcher, prices, limits)
    if not fitting:
        with pytest.raises(PlanError, match=r"fits into|what was fixed"):
            searcher.best(limits)
        return
    found = searcher.best(limits)
    assert found.prediction.step_time_s == pytest.approx(min(p.seconds for p in fitting), rel=1e-9)
    assert all(share.peak_bytes <= share.limit_bytes for share in found.shares)
    assert found.certificate.gap == 0 and found.certificate.enumerated == len(prices)
    assert predict(searcher.graph, found.best, found.cluster).step_time_s == pytest.approx(
        found.prediction.step_time_s, rel=1e-9
    )


def assert_bounds_are_below(searcher: MixedSearcher, prices: Prices, limits: tuple[int, ...]) -> None:
    num_bounded = 0
    for table in searcher.bounds(limits):
        num_bounded += table.num_by_rule
        for index in map(int, np.flatnonzero(np.isfinite(table.seconds.ravel()))):
            num_bounded += 1
            price = prices[table.choice(index)]
            if price is not None:
                assert not table.is_large.flat[index], price.choice
                assert table.seconds.flat[index] <= price.seconds * CLOSE, price.choice
    assert num_bounded == len(prices)
