"""Shards tile the tensor: no gap, no overlap, whatever the sizes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardstage.layout import Partial, Replicate, Shard, balanced_sizes


@given(units=st.integers(0, 60), num_ranks=st.integers(1, 9), unit=st.integers(1, 8))
def test_balanced_sizes_tile_in_units_and_differ_by_one_unit_at_most(
    units: int, num_ranks: int, unit: int
) -> None:
    sizes = balanced_sizes(units * unit, num_ranks, unit=unit)
    assert sum(sizes) == units * unit
    assert len(sizes) == num_ranks
    assert all(size % unit == 0 for size in sizes)
    assert max(sizes) - min(sizes) in (0, unit)
    assert list(sizes) == sorted(sizes, reverse=True)


def test_ten_heads_on_four_ranks() -> None:
    assert balanced_sizes(10 * 64, 4, unit=64) == (192, 192, 128, 128)


def test_a_rank_may_get_nothing() -> None:
    assert balanced_sizes(1, 3) == (1, 0, 0)


def test_a_length_that_is_no_multiple_of_the_unit_is_refused() -> None:
    with pytest.raises(ValueError, match="10 is not a multiple of the unit 4"):
        balanced_sizes(10, 2, unit=4)


@given(
    num_ranks=st.integers(1, 5),
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    dim=st.integers(0, 3),
)
def test_the_intervals_of_all_ranks_tile_the_dim(num_ranks: int, lengths: list[int], dim: int) -> None:
    shard = Shard(dim=dim, sections=tuple(balanced_sizes(length, num_ranks) for length in lengths))
    indices = [
        index
        for rank in range(num_ranks)
        for start, stop in shard.intervals(rank)
        for index in range(start, stop)
    ]
    assert sorted(indices) == list(range(sum(lengths)))
    assert shard.length == sum(lengths)
    assert sum(shard.sizes()) == shard.length


def test_a_fused_weight_is_cut_section_by_section() -> None:
    shard = Shard(dim=0, sections=((4, 2), (4, 2), (4, 2)))
    assert shard.intervals(0) == ((0, 4), (6, 10), (12, 16))
    assert shard.intervals(1) == ((4, 6), (10, 12), (16, 18))
    assert shard.sizes() == (12, 6)


def test_moving_a_shard_to_another_dim_keeps_its_sections() -> None:
    shard = Shard(dim=0, sections=((3, 2),))
    assert shard.with_dim(2) == Shard(dim=2, sections=((3, 2),))


def test_placements_have_the_letters_of_the_field() -> None:
    assert [str(p) for p in (Replicate(), Replicate(has_partial_grad=True), Partial())] == ["I", "R", "P"]
    assert str(Shard(dim=1, sections=((3, 2), (1, 1)))) == "S(1: 3/2 + 1/1)"
