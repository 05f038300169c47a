"""Where a shard lies after its tensor got another shape."""

from __future__ import annotations

from fractions import Fraction
from math import gcd, prod

from shardstage.layout import Shard

__all__ = ["Reshaped", "dim_groups", "reshape_shard"]

Reshaped = tuple[Shard, Fraction]
"""The shard in the new shape, and how many elements of the old dim one of the new dim stands for."""

Sections = tuple[tuple[int, ...], ...]


def reshape_shard(shard: Shard, old: tuple[int, ...], new: tuple[int, ...]) -> Reshaped | int | None:
    """The shard in the new shape.

    An int is the unit that every size would have to be a multiple of; None says that no unit helps.

        S(2) of [B, S, H * d]  →  S(2) of [B, S, H, d]     when every size is a multiple of d
        S(1) of [B, S, D]      →  S(0) of [B * S, D]       with B sections
    """
    for old_dims, new_dims in dim_groups(old, new):
        if shard.dim in old_dims:
            return _within_group(shard, old, old_dims, new, new_dims)
    return None


def dim_groups(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[range, range]]:
    """Smallest runs of old and new dims with equal numbers of elements, in order."""
    groups: list[tuple[range, range]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        start_i, start_j = i, j
        size_i, size_j = 1, 1
        if i < len(old):
            size_i, i = old[i], i + 1
        if j < len(new):
            size_j, j = new[j], j + 1
        while size_i != size_j:
            if size_i < size_j and i < len(old):
                size_i, i = size_i * old[i], i + 1
            elif size_j < size_i and j < len(new):
                size_j, j = size_j * new[j], j + 1
            else:
                return [(range(len(old)), range(len(new)))]
        groups.append((range(start_i, i), range(start_j, j)))
    return groups


def _within_group(
    shard: Shard, old: tuple[int, ...], old_dims: range, new: tuple[int, ...], new_dims: range
) -> Reshaped | int | None:
    outer = prod(old[old_dims.start : shard.dim])
    inner = prod(old[shard.dim + 1 : old_dims.stop])
    flat = tuple(tuple(size * inner for size in section) for section in shard.sections) * outer
    units: list[int] = []
    for dim in new_dims:
        if new[dim] == 1 and shard.length > 1:
            continue
        new_outer = prod(new[new_dims.start : dim])
        new_inner = prod(new[dim + 1 : new_dims.stop])
        run = _repeated_run(flat, new_outer, new[dim] * new_inner)
        if run is None:
            continue
        if all(size % new_inner == 0 for section in run for size in section):
            sections = tuple(tuple(size // new_inner for size in section) for section in run)
            return Shard(dim=dim, sections=sections), Fraction(new_inner, inner)
        units.append(new_inner // gcd(inner, new_inner))
    return min(units) if units else None


def _repeated_run(flat: Sections, times: int, length: int) -> Sections | None:
    """The sections of one of ``times`` equal runs of ``length`` elements each."""
    per_run = len(flat) // times
    if per_run * times != len(flat):
        return None
    run = flat[:per_run]
    return run if sum(map(sum, run)) == length and run * times == flat else None
