"""The collectives of a tensor that is cut along one dim, evenly or not: reduce, gather, scatter, take.

    sections = ((4, 3), (4, 3))      two sections of seven elements; rank 0 holds four of each, rank 1 three

All of them take contiguous buffers to ``torch.distributed`` and copy as little as the cut allows: nothing where it is even, in one
section, and the dims before it have one element.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from shardstage import compat
from shardstage.operators.context import OperatorContext

__all__ = ["Sections", "all_reduce", "gather", "reduce_scatter", "take"]

Sections = tuple[tuple[int, ...], ...]


def all_reduce(tensor: Tensor, context: OperatorContext, *, in_place: bool = False) -> Tensor:
    """The sum over the ranks; in the memory of ``tensor`` where that is allowed and contiguous."""
    if context.tp_group is None:
        return tensor
    summed = (
        tensor if in_place and tensor.is_contiguous() else tensor.clone(memory_format=torch.contiguous_format)
    )
    dist.all_reduce(summed, group=context.tp_group)
    return summed


def gather(local: Tensor, dim: int, sections: Sections, context: OperatorContext) -> Tensor:
    """The whole tensor from every rank's part."""
    if context.tp_group is None:
        return local
    shapes = [_with_size(local, dim, _held(sections, rank)) for rank in range(context.tp_size)]
    whole = local.new_empty(_with_size(local, dim, sum(map(sum, sections))))
    if _is_direct(whole, dim, sections):
        compat.all_gather_single(whole.view(-1), local.reshape(-1), context.tp_group)
        return whole
    largest = max(map(prod, shapes))
    buffer = local.new_empty((context.tp_size, largest))
    compat.all_gather_single(buffer.view(-1), _padded(local, largest), context.tp_group)
    for rank, shape in enumerate(shapes):
        part = buffer[rank, : prod(shape)].view(shape)
        for target, source in _matching(whole, part, dim, sections, rank):
            target.copy_(source)
    return whole


def reduce_scatter(summand: Tensor, dim: int, sections: Sections, context: OperatorContext) -> Tensor:
    """This rank's part of the sum over the ranks."""
    if context.tp_group is None:
        return summand
    shapes = [_with_size(summand, dim, _held(sections, rank)) for rank in range(context.tp_size)]
    own = shapes[context.tp_rank]
    if _is_direct(summand, dim, sections):
        part = summand.new_empty(own)
        compat.reduce_scatter_single(part.view(-1), summand.reshape(-1), context.tp_group)
        return part
    largest = max(map(prod, shapes))
    buffer = summand.new_empty((context.tp_size, largest))
    for rank, shape in enumerate(shapes):
        part = buffer[rank, : prod(shape)].view(shape)
        for source, target in _matching(summand, part, dim, sections, rank):
            target.copy_(source)
    flat = summand.new_empty(largest)
    compat.reduce_scatter_single(flat, buffer.view(-1), context.tp_group)
    return flat[: prod(own)].view(own)


def take(whole: Tensor, dim: int, intervals: Sequence[tuple[int, int]]) -> Tensor:
    """The elements of ``intervals`` along ``dim``: a view where they are one."""
    if len(intervals) == 1:
        start, stop = intervals[0]
        return whole.narrow(dim, start, stop - start)
    return torch.cat([whole.narrow(dim, start, stop - start) for start, stop in intervals], dim)


def intervals_of(sections: Sections, rank: int) -> list[tuple[int, int]]:
    """What ``rank`` holds of the whole dim."""
    found, base = [], 0
    for section in sections:
        start = base + sum(section[:rank])
        found.append((start, start + section[rank]))
        base += sum(section)
    return found


def _held(sections: Sections, rank: int) -> int:
    return sum(section[rank] for section in sections)


def _with_size(tensor: Tensor, dim: int, size: int) -> tuple[int, ...]:
    return (*tensor.shape[:dim], size, *tensor.shape[dim + 1 :])


def _is_direct(whole: Tensor, dim: int, sections: Sections) -> bool:
    """Whether the parts lie one after the other in the memory of the whole, all of one size."""
    return len(sections) == 1 and len(set(sections[0])) == 1 and prod(whole.shape[:dim]) == 1


def _padded(local: Tensor, numel: int) -> Tensor:
    flat = local.reshape(-1)
    if flat.numel() == numel:
        return flat
    padded = local.new_empty(numel)
    padded[: flat.numel()] = flat
    return padded


def _matching(
    whole: Tensor, part: Tensor, dim: int, sections: Sections, rank: int
) -> list[tuple[Tensor, Tensor]]:
    """Views of the whole and of the part of ``rank`` that hold the same elements; one pair where all sections are alike."""
    first = sections[0]
    if all(section == first for section in sections):
        rows, count = len(sections), first[rank]
        return [
            (
                torch.unflatten(whole, dim, (rows, sum(first))).narrow(dim + 1, sum(first[:rank]), count),
                torch.unflatten(part, dim, (rows, count)),
            )
        ]
    pairs, held = [], 0
    for start, stop in intervals_of(sections, rank):
        pairs.append((whole.narrow(dim, start, stop - start), part.narrow(dim, held, stop - start)))
        held += stop - start
    return pairs
