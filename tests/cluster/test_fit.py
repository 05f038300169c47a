"""Lines through measurements."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardstage.cluster.fit import fit_linear
from shardstage.errors import ClusterError

SIZES = (1e3, 3e4, 1e6, 8e6)


@given(latency_s=st.floats(1e-6, 1e-1), bytes_per_s=st.floats(1e6, 1e12))
def test_points_on_a_line_give_the_line_back(latency_s: float, bytes_per_s: float) -> None:
    seconds = [latency_s + size / bytes_per_s for size in SIZES]
    line = fit_linear(SIZES, seconds)
    assert [line.seconds(size) for size in SIZES] == pytest.approx(seconds, rel=1e-6)


@given(st.lists(st.floats(1e-6, 10.0), min_size=4, max_size=4))
def test_any_positive_times_give_a_line_that_can_be(seconds: list[float]) -> None:
    line = fit_linear(SIZES, seconds)
    assert line.latency_s >= 0
    assert line.bytes_per_s > 0


def test_small_sizes_count_as_much_as_large_ones() -> None:
    seconds = [1e-4, 1.3e-4, 1.1e-3, 8.1e-3]
    line = fit_linear(SIZES, seconds)
    assert [line.seconds(size) for size in SIZES] == pytest.approx(seconds, rel=0.1)


def test_one_size_is_no_line() -> None:
    with pytest.raises(ClusterError, match="a line needs two sizes and positive times"):
        fit_linear([1e3, 1e3], [1.0, 1.0])
    with pytest.raises(ClusterError, match="a line needs two sizes and positive times"):
        fit_linear([1e3, 2e3], [0.0, 1.0])
