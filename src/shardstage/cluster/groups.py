"""How a group of ranks lies over the parts of a tree.

A ``range`` of ranks costs O(1) per level however long it is; any other sequence is counted rank by rank.

    ranks 0, 3, 6, 9, 12 over nodes of 4      0 . . 3 | . . 6 . | . 9 . . | 12 . . .
                                              4 nodes, at least 1 and at most 2 ranks in one
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

__all__ = ["Group", "Spread", "cut", "most_parts", "rising", "spread"]

Group: TypeAlias = Sequence[int]
"""Distinct ranks; a ``range`` among them rises."""


class Spread(NamedTuple):
    """Over units of so many ranks each: how many hold any of the group, and how many of it they hold."""

    units: int
    fewest: int
    most: int


def rising(ranks: Group) -> Group:
    """The same ranks; a ``range`` that falls is turned round."""
    return ranks[::-1] if isinstance(ranks, range) and ranks.step < 0 else ranks


def spread(group: Group, unit: int) -> Spread:
    """How a group that is not empty lies over units of ``unit`` neighbouring ranks."""
    if isinstance(group, range):
        return _range_spread(group, unit)
    held = Counter(rank // unit for rank in group).values()
    return Spread(len(held), min(held), max(held))


def most_parts(group: Group, unit: int, size: int) -> int:
    """Of blocks of ``size`` units of ``unit`` ranks: how many units of one block hold any of the group, at most."""
    if not isinstance(group, range):
        return spread(tuple({rank // unit for rank in group}), size).most
    if group.step > unit:  # no two of its ranks in one unit
        return spread(group, unit * size).most
    return spread(range(group[0] // unit, group[-1] // unit + 1), size).most


def cut(group: Group, first: int, count: int) -> Group:
    """The ranks of the group among ``count`` from ``first`` on, counted from there."""
    if not isinstance(group, range):
        return [rank - first for rank in group if first <= rank < first + count]
    before, through = (
        min(max(-((group.start - bound) // group.step), 0), len(group)) for bound in (first, first + count)
    )
    return range(
        group.start + before * group.step - first, group.start + through * group.step - first, group.step
    )


def _range_spread(group: range, unit: int) -> Spread:
    """Units between the first and the last hold floor(unit / step) or one more: what they hold together tells which."""
    count, step = len(group), group.step
    if step >= unit:
        return Spread(count, 1, 1)
    first, last = group[0], group[-1]
    units = last // unit - first // unit + 1
    if units == 1:
        return Spread(1, count, count)
    ends = (-(-(unit - first % unit) // step), last % unit // step + 1)
    between = count - sum(ends)
    if units == 2:
        return Spread(units, min(ends), max(ends))
    return Spread(units, min(*ends, between // (units - 2)), max(*ends, -(-between // (units - 2))))
