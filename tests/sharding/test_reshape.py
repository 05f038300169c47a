"""Where a shard lies after a reshape, held against what a reshape does to elements."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from math import prod

import torch
from hypothesis import given
from hypothesis import strategies as st

from shardstage.layout import Shard, balanced_sizes
from shardstage.operators.moves import take
from shardstage.sharding.reshape import dim_groups, reshape_shard

sizes = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[Shard, tuple[int, ...], tuple[int, ...]]:
    """A shard of a shape, and another shape of as many elements: the first with neighbours merged, or the other way round."""
    fine = draw(sizes)
    cuts = sorted(draw(st.sets(st.integers(0, len(fine)))) | {0, len(fine)})
    coarse = tuple(prod(fine[a:b]) for a, b in pairwise(cuts))
    old, new = (fine, coarse) if draw(st.booleans()) else (coarse, fine)
    dim = draw(st.integers(0, len(old) - 1))
    num_sections = draw(st.sampled_from([n for n in range(1, old[dim] + 1) if old[dim] % n == 0]))
    section = balanced_sizes(old[dim] // num_sections, draw(st.integers(1, 3)))
    return Shard(dim=dim, sections=(section,) * num_sections), old, new


@given(reshapes())
def test_a_part_reshaped_is_the_part_of_the_reshaped(
    case: tuple[Shard, tuple[int, ...], tuple[int, ...]],
) -> None:
    shard, old, new = case
    found = reshape_shard(shard, old, new)
    if not isinstance(found, tuple):
        return
    moved, scale = found
    whole = torch.arange(prod(old)).view(old)
    assert moved.length == new[moved.dim]
    for rank in range(shard.num_ranks):
        part = take(whole, shard.dim, shard.intervals(rank))
        expected = take(whole.view(new), moved.dim, moved.intervals(rank))
        assert part.reshape(expected.shape).equal(expected)
        assert shard.size(rank) * prod(old) * new[moved.dim] == moved.size(rank) * prod(old) * old[shard.dim]
    assert scale > 0


@given(sizes, st.data())
def test_groups_hold_equally_many_elements_on_both_sides(fine: tuple[int, ...], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(fine)))) | {0, len(fine)})
    coarse = tuple(prod(fine[a:b]) for a, b in pairwise(cuts))
    for old_dims, new_dims in dim_groups(fine, coarse):
        assert prod(fine[d] for d in old_dims) == prod(coarse[d] for d in new_dims)


def test_heads_are_cut_where_the_projection_is() -> None:
    shard = Shard(dim=2, sections=((8, 4),))
    assert reshape_shard(shard, (2, 7, 12), (2, 7, 3, 4)) == (
        Shard(dim=2, sections=((2, 1),)),
        Fraction(4),
    )


def test_a_cut_within_a_head_asks_for_whole_heads() -> None:
    assert reshape_shard(Shard(dim=2, sections=((6, 6),)), (2, 7, 12), (2, 7, 3, 4)) == 4


def test_tokens_cut_in_every_sample_are_sections_of_the_flattened() -> None:
    shard = Shard(dim=1, sections=((4, 3),))
    flat = Shard(dim=0, sections=((4, 3), (4, 3)))
    assert reshape_shard(shard, (2, 7, 5), (14, 5)) == (flat, Fraction(1))
    assert reshape_shard(flat, (14, 5), (2, 7, 5)) == (shard, Fraction(1))


def test_three_sections_become_a_dim_of_their_own() -> None:
    fused = Shard(dim=1, sections=((8, 4),) * 3)
    assert reshape_shard(fused, (5, 36), (5, 3, 3, 4)) == (Shard(dim=2, sections=((2, 1),)), Fraction(4))
