"""Boxes tile the tensor, whatever the placement and the flat cuts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardstage.layout import Placement, Replicate, Shard, balanced_sizes
from shardstage.layout.boxes import Box, boxes, local_shape, row_major_strides

Cut = tuple[int, int] | None


@st.composite
def sharded_tensors(draw: st.DrawFn) -> tuple[tuple[int, ...], Placement]:
    """A shape and how one of its dims is cut: evenly or not, in one or several sections, empty pieces included."""
    num_ranks = draw(st.integers(1, 4))
    sizes = st.lists(st.integers(0, 4), min_size=num_ranks, max_size=num_ranks).map(tuple)
    sections = tuple(draw(st.lists(sizes, min_size=1, max_size=3)))
    shape = list(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    dim = draw(st.integers(0, len(shape) - 1))
    placement = Shard(dim=dim, sections=sections)
    shape[dim] = placement.length
    return tuple(shape), placement


@st.composite
def flat_cuts(draw: st.DrawFn, numel: int) -> list[Cut]:
    """Ranges that follow each other and cover ``numel`` elements, some empty."""
    inner = sorted(draw(st.lists(st.integers(0, numel), max_size=3)))
    return list(pairwise([0, *inner, numel]))


def whole(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(math.prod(shape)).reshape(shape)


def held(shape: tuple[int, ...], placement: Placement, rank: int) -> np.ndarray:
    """The local tensor of a rank, by the definition of the placement."""
    if not isinstance(placement, Shard):
        return whole(shape)
    parts = [
        whole(shape).take(range(*interval), axis=placement.dim) for interval in placement.intervals(rank)
    ]
    return np.concatenate(parts, axis=placement.dim)


def at(flat: np.ndarray, start: int, sizes: Sequence[int], strides: Sequence[int]) -> np.ndarray:
    """The elements of a box in the flat piece, by the formula of ``boxes``."""
    found = [
        flat[start + sum(p * s for p, s in zip(position, strides, strict=True))]
        for position in product(*map(range, sizes))
    ]
    return np.array(found).reshape(sizes)


def inside(tensor: np.ndarray, box: Box) -> np.ndarray:
    return tensor[tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))]


@settings(deadline=None, max_examples=200)
@given(data=st.data(), tensor=sharded_tensors())
def test_the_boxes_of_all_ranks_tile_the_tensor(
    data: st.DataObject, tensor: tuple[tuple[int, ...], Shard]
) -> None:
    shape, placement = tensor
    times_held = np.zeros(shape, dtype=int)
    for rank in range(placement.num_ranks):
        for cut in data.draw(flat_cuts(math.prod(local_shape(shape, placement, rank)))):
            for box, _ in boxes(shape, placement, rank, cut):
                inside(times_held, box)[...] += 1
    assert (times_held == 1).all()


@settings(deadline=None, max_examples=200)
@given(data=st.data(), tensor=sharded_tensors())
def test_a_box_names_the_elements_that_lie_in_memory(
    data: st.DataObject, tensor: tuple[tuple[int, ...], Shard]
) -> None:
    shape, placement = tensor
    for rank in range(placement.num_ranks):
        local = held(shape, placement, rank)
        assert local.shape == local_shape(shape, placement, rank)
        for cut in data.draw(flat_cuts(local.size)):
            assert cut is not None
            flat = local.reshape(-1)[cut[0] : cut[1]]
            for box, start in boxes(shape, placement, rank, cut):
                found = at(flat, start, box.sizes, row_major_strides(local.shape))
                assert (found == inside(whole(shape), box)).all()


@given(data=st.data(), shape=st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple))
def test_a_flat_range_of_n_dims_is_at_most_2n_minus_1_boxes(
    data: st.DataObject, shape: tuple[int, ...]
) -> None:
    for cut in data.draw(flat_cuts(math.prod(shape))):
        found = boxes(shape, Replicate(), 0, cut)
        assert len(found) <= 2 * len(shape) - 1
        assert all(box.numel > 0 for box, _ in found)


def test_a_range_is_the_end_of_a_row_then_whole_rows_then_the_beginning_of_one() -> None:
    assert boxes((4, 5), Replicate(), 0, (3, 17)) == (
        (Box(offsets=(0, 3), sizes=(1, 2)), 0),
        (Box(offsets=(1, 0), sizes=(2, 5)), 2),
        (Box(offsets=(3, 0), sizes=(1, 2)), 12),
    )


def test_a_fused_weight_is_cut_at_its_sections() -> None:
    fused = Shard(dim=1, sections=((2, 1), (2, 1)))
    assert boxes((3, 6), fused, 0) == (
        (Box(offsets=(0, 0), sizes=(3, 2)), 0),
        (Box(offsets=(0, 3), sizes=(3, 2)), 2),
    )


def test_a_rank_that_holds_nothing_has_no_boxes() -> None:
    uneven = Shard(dim=0, sections=(balanced_sizes(2, 3),))
    assert boxes((2, 4), uneven, 2) == ()
    assert boxes((2, 4), uneven, 0, (2, 2)) == ()


def test_a_number_is_one_box() -> None:
    assert boxes((), Replicate(), 0) == ((Box(offsets=(), sizes=()), 0),)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"\(0, 7\) is no range of the elements of a tensor of shape \(2, 3\)"
    ):
        boxes((2, 3), Replicate(), 0, (0, 7))
    with pytest.raises(ValueError, match=r"S\(0: 1/1\) does not fit a tensor of shape \(3,\)"):
        boxes((3,), Shard(dim=0, sections=((1, 1),)), 0)
