"""Stages that lack room: which choices are left out before they are cut, and that none of them is any good."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from tests.cost.toy import toy_graph
from tests.planner.brute import CLOSE, PLENTY, every_choice, searcher_of

from shardstage.planner import Searcher
from shardstage.planner.room import _largest_least
from shardstage.planner.space import Choice

LONG = toy_graph(num_layers=12, width=256, hidden=256, vocab=256)


def left_out(searcher: Searcher, below_s: float) -> list[Choice]:
    """Under the limit that was searched last: those whose bound is raised to what a step was to stay below."""
    bounds = searcher.bounds(np.arange(len(searcher.lattice.groups)), below_s)
    return [bounds.choice(int(index)) for index in np.flatnonzero(bounds.seconds.ravel() == below_s)]


@pytest.mark.parametrize("ratio", [0.7, 0.6, 0.5])
def test_what_lacks_room_neither_fits_nor_is_quick(ratio: float) -> None:
    """Long pipelines of layers that keep much: without this they were all cut, one by one, to find that they do not fit."""
    searcher = searcher_of(LONG, ranks=8, batch=24)
    limit = int(ratio * searcher.best(PLENTY).prediction.peak_bytes)
    below_s = 2 * searcher.best(limit).prediction.step_time_s
    found = left_out(searcher, below_s)
    assert {choice.schedule.name for choice in found} == {"1f1b"}
    assert sum(choice.mesh.pp > 2 for choice in found) > 20
    for choice in found:
        price = searcher.pricing.price(choice, limit)
        assert price is None or price.seconds * CLOSE >= below_s, choice


def test_nothing_lacks_room_where_there_is_plenty() -> None:
    """Whatever is known to be the best: a choice that is quicker has a lower bound."""
    searcher = searcher_of(LONG, ranks=4)
    best = searcher.best(PLENTY)
    prices = {choice: searcher.pricing.price(choice, PLENTY) for choice in every_choice(searcher)}
    for below_s in (1.2 * best.prediction.step_time_s, 2.0 * best.prediction.step_time_s):
        for choice in left_out(searcher, below_s):
            price = prices[choice]
            assert price is not None
            assert price.seconds * CLOSE >= below_s


@pytest.mark.parametrize("seed", range(20))
def test_the_best_weight_is_as_good_as_any(seed: int) -> None:
    random = Random(seed)
    first, second = ([random.uniform(0.01, 1.0) for _ in range(random.randint(1, 3))] for _ in "ab")
    number = min(len(first), len(second))
    lines = list(zip(first[:number], second[:number], strict=True))
    weights = np.linspace(0.0, 1.0, 20001)
    expected = np.min([u * weights + v * (1 - weights) for u, v in lines], axis=0).max()
    arrays = ([np.array([[value]]) for value in values] for values in zip(*lines, strict=True))
    found = _largest_least(*arrays)
    assert found[0, 0] == pytest.approx(expected, rel=1e-4)
    assert found[0, 0] >= expected * (1 - 1e-12)


def test_lines_that_never_cross_are_weighed_at_their_ends() -> None:
    same = [np.array([[0.5]]), np.array([[0.5]])]
    assert _largest_least(same, same)[0, 0] == 0.5
    assert _largest_least([np.array([[0.2]])], [np.array([[0.7]])])[0, 0] == 0.7
