"""Balanced stages, held against trying every cut."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardstage.cost.balance import balanced, slowest

WEIGHTS = st.lists(st.floats(0, 100), min_size=1, max_size=9)


def squares(weights: list[float], starts: tuple[int, ...]) -> float:
    stops = (*starts[1:], len(weights))
    return sum(sum(weights[a:b]) ** 2 for a, b in zip(starts, stops, strict=True))


@given(WEIGHTS, st.integers(1, 9))
def test_no_other_cut_has_a_lighter_heaviest_stage_or_is_as_light_and_more_even(
    weights: list[float], num_stages: int
) -> None:
    num_stages = min(num_stages, len(weights))
    starts = balanced(weights, num_stages)
    assert starts[0] == 0 and len(starts) == num_stages and list(starts) == sorted(set(starts))
    every = [(0, *cut) for cut in combinations(range(1, len(weights)), num_stages - 1)]
    lightest = min(slowest(weights, cut) for cut in every)
    assert slowest(weights, starts) <= lightest * (1 + 1e-8) + 1e-12
    as_light = [cut for cut in every if slowest(weights, cut) <= lightest * (1 + 1e-12)]
    assert squares(weights, starts) <= min(squares(weights, cut) for cut in as_light) * (1 + 1e-8) + 1e-9


def test_of_equal_cuts_later_stages_get_more() -> None:
    """1F1B holds most activations on the first stages."""
    assert balanced([1.0] * 7, 3) == (0, 2, 4)
    assert balanced([1.0, 1.0, 1.0, 1.0, 3.0], 2) == (0, 3)


def test_more_stages_than_units_are_refused() -> None:
    with pytest.raises(ValueError, match="2 units cannot make 3 stages"):
        balanced([1.0, 1.0], 3)
