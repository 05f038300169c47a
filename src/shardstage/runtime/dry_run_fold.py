"""Which microbatches of a rank's row are executed in a dry run, and what the others, that are alike, would do.

row         F0 F1 F2 F3 B0 F4 B1 F5 B2 F6 B3 F7 B4 B5 B6 B7
executed    F0 F1 F2    B0    B1    B2       F7          B7      the first, the last, and two of each size between
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from shardstage.program import Instruction
from shardstage.runtime.dry_run_recorder import Act

__all__ = ["NUM_BETWEEN", "Twins", "executed_microbatches", "only"]

NUM_BETWEEN = 2
"""Microbatches of a size that are executed between the first and the last: two, so that one can be held against the other."""


class _Kind(NamedTuple):
    """Instructions that differ in nothing but their microbatch."""

    stage: int | None
    kind: str
    peer: int | None
    size: int
    place: str


@dataclass(frozen=True, kw_only=True)
class Twins:
    """Which executed act stands for each instruction of a row, by position.

    ``unlike`` is the first pair of acts that should have been alike and were not.
    """

    acts: tuple[Act, ...]
    unlike: tuple[Act, Act] | None

    @staticmethod
    def of(row: Sequence[Instruction], sizes: Sequence[int], acts: Sequence[Act]) -> Twins:
        kinds = _kinds(row, sizes)
        executed = {act.instruction: act for act in acts}
        by_kind: dict[_Kind, Act] = {}
        unlike = None
        for instruction, kind in zip(row, kinds, strict=True):
            act = executed.get(instruction)
            if act is None:
                continue
            twin = by_kind.setdefault(kind, act)
            if unlike is None and not _is_alike(act, twin):
                unlike = (twin, act)
        found = (executed.get(i) or by_kind[kind] for i, kind in zip(row, kinds, strict=True))
        return Twins(acts=tuple(found), unlike=unlike)


def executed_microbatches(row: Sequence[Instruction], sizes: Sequence[int]) -> frozenset[int]:
    """The first and the last microbatch of each kind of instruction, and ``NUM_BETWEEN`` of each size between."""
    kinds = _kinds(row, sizes)
    chosen = {
        i.microbatch
        for i, kind in zip(row, kinds, strict=True)
        if kind.place != "between" and i.microbatch is not None
    }
    for size in dict.fromkeys(sizes):
        between = [m for m, other in enumerate(sizes) if other == size and m not in chosen]
        chosen.update(between[:NUM_BETWEEN])
    return frozenset(chosen)


def only(row: Sequence[Instruction], microbatches: frozenset[int]) -> tuple[Instruction, ...]:
    """The row without the instructions of other microbatches."""
    return tuple(i for i in row if i.microbatch is None or i.microbatch in microbatches)


def _kinds(row: Sequence[Instruction], sizes: Sequence[int]) -> list[_Kind]:
    ends: dict[tuple[int | None, str, int | None], list[int]] = {}
    for position, i in enumerate(row):
        ends.setdefault((i.stage, i.kind, i.peer), [position, position])[1] = position
    return [_kind(i, position, ends[i.stage, i.kind, i.peer], sizes) for position, i in enumerate(row)]


def _kind(instruction: Instruction, position: int, ends: Sequence[int], sizes: Sequence[int]) -> _Kind:
    microbatch = instruction.microbatch
    place = {ends[0]: "first", ends[1]: "last"}.get(position, "between")
    size = 0 if microbatch is None else sizes[microbatch]
    return _Kind(instruction.stage, instruction.kind, instruction.peer, size, place)


def _is_alike(one: Act, other: Act) -> bool:
    return (one.collectives, one.sent, one.change, _total(one.rise)) == (
        other.collectives,
        other.sent,
        other.change,
        _total(other.rise),
    )


def _total(rise: Mapping[str, int]) -> int:
    return sum(rise.values())
