"""The boxes of a whole tensor that a rank holds, even when it keeps only a flat range of its shard."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from shardstage.layout.placement import Placement, Shard

__all__ = ["Box", "boxes", "local_shape", "row_major_strides"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Box:
    """Elements ``offsets[d] <= i[d] < offsets[d] + sizes[d]`` of a tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)


def boxes(
    shape: tuple[int, ...], placement: Placement, rank: int, flat_range: tuple[int, int] | None = None
) -> tuple[tuple[Box, int], ...]:
    """The boxes of a tensor of ``shape`` that ``rank`` of the placement's axis holds, none empty, each with where it starts in memory.

    The rank has the row-major elements a <= i < b of its local tensor, ``flat_range`` = (a, b): a flat shard of ZeRO, rows of FSDP; None is
    all of it. A box's element at position p lies at ``start + sum(p[d] * strides[d])`` of that flat piece, where ``strides`` are the local
    tensor's. A range of a local tensor of n dims is at most 2n - 1 boxes; elements 3 to 16 of a 4 × 5 tensor are

        · · · 1 1        the end of a row
        2 2 2 2 2        whole rows
        2 2 2 2 2
        3 3 · · ·        the beginning of a row

    and each is cut where it spans several sections of a fused weight. Raises ValueError for a range that the local tensor does not have.
    """
    local = local_shape(shape, placement, rank)
    start, stop = (0, math.prod(local)) if flat_range is None else flat_range
    if not 0 <= start <= stop <= math.prod(local):
        raise ValueError(f"{(start, stop)} is no range of the elements of a tensor of shape {local}")
    strides = row_major_strides(local)
    found = []
    for box in _range_boxes(local, start, stop):
        for part, whole in _cut_at_sections(box, placement, rank):
            first = sum(offset * stride for offset, stride in zip(part.offsets, strides, strict=True))
            found.append((whole, first - start))
    return tuple(found)


def local_shape(shape: tuple[int, ...], placement: Placement, rank: int) -> tuple[int, ...]:
    """The shape of what ``rank`` of the placement's axis holds. Raises ValueError where the placement does not fit ``shape``."""
    if not isinstance(placement, Shard):
        return shape
    if not placement.dim < len(shape) or shape[placement.dim] != placement.length:
        raise ValueError(f"{placement} does not fit a tensor of shape {shape}")
    return (*shape[: placement.dim], placement.size(rank), *shape[placement.dim + 1 :])


def row_major_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """How far apart in memory neighbours along each dim lie, in elements."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _range_boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Elements start <= i < stop of a row-major tensor as boxes, in order."""
    if start == stop:
        return
    if (start, stop) == (0, math.prod(shape)):
        yield Box(offsets=(0,) * len(shape), sizes=shape)
        return
    row_numel = math.prod(shape[1:])
    first, last = -(-start // row_numel), stop // row_numel
    if first > last:
        yield from _in_row(shape, last, start, stop)
        return
    yield from _in_row(shape, first - 1, start, first * row_numel)
    if first < last:
        yield Box(offsets=(first, *(0,) * (len(shape) - 1)), sizes=(last - first, *shape[1:]))
    yield from _in_row(shape, last, last * row_numel, stop)


def _in_row(shape: tuple[int, ...], row: int, start: int, stop: int) -> Iterator[Box]:
    """A range that lies within one row."""
    first = row * math.prod(shape[1:])
    for box in _range_boxes(shape[1:], start - first, stop - first):
        yield Box(offsets=(row, *box.offsets), sizes=(1, *box.sizes))


def _cut_at_sections(local: Box, placement: Placement, rank: int) -> Iterator[tuple[Box, Box]]:
    """A box of the local tensor as (part of it, the same elements in the whole tensor), one for each section that it meets."""
    if not isinstance(placement, Shard):
        yield local, local
        return
    dim = placement.dim
    box_start, box_stop = local.offsets[dim], local.offsets[dim] + local.sizes[dim]
    section_start = 0
    for whole_start, whole_stop in placement.intervals(rank):
        section_stop = section_start + whole_stop - whole_start
        start, stop = max(box_start, section_start), min(box_stop, section_stop)
        if start < stop:
            part = _with_dim(local, dim, start, stop)
            yield (
                part,
                _with_dim(
                    local, dim, start - section_start + whole_start, stop - section_start + whole_start
                ),
            )
        section_start = section_stop


def _with_dim(box: Box, dim: int, start: int, stop: int) -> Box:
    return Box(
        offsets=(*box.offsets[:dim], start, *box.offsets[dim + 1 :]),
        sizes=(*box.sizes[:dim], stop - start, *box.sizes[dim + 1 :]),
    )
