"""Folding: columns that no check can tell apart are checked once.

A *column* is one pipeline: the rows of all pp at one (dp, tp). Columns begin as alike if they have the same rows, and are told apart while
their groups along tp or dp hold different kinds of columns. Columns of one kind then act in lockstep: whatever an instruction waits for
is, for each of them, another member of the same kind at the same step. So a group may be checked, and a deadlock found, with one
member of each kind that is in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Never

from shardstage.errors import ProgramError
from shardstage.program.instruction import Instruction
from shardstage.program.program import Collective, Program, Row
from shardstage.program.verify_grid import Track, draw, times_of

__all__ = ["Call", "Column", "Fold", "fold_of", "tied_ranks"]


@dataclass(frozen=True, slots=True)
class Call:
    """A collective of a row and the step (index of the instruction) that runs it."""

    step: int
    collective: Collective


@dataclass(frozen=True, kw_only=True, eq=False)
class Column:
    """The pipeline at (dp, tp), whose row at pipeline rank pp is ``rows[pp]``."""

    program: Program
    dp: int
    tp: int
    rows: tuple[Row, ...]

    def rank(self, pp: int) -> int:
        return self.program.mesh.rank(pp=pp, dp=self.dp, tp=self.tp)

    def where(self, pp: int) -> str:
        return f"rank {self.rank(pp)} (pp={pp} dp={self.dp} tp={self.tp})"

    def steps(self, pp: int) -> Iterator[tuple[int, Instruction]]:
        return enumerate(self.rows[pp].instructions)

    def refuse(self, pp: int, step: int, what: str, *, hint: str) -> Never:
        """Raises the error that stands at a rank's step, with the grid around it; ``step`` may be one past the last."""
        instructions = self.rows[pp].instructions
        marked = min(step, len(instructions) - 1)
        name = f" {instructions[step].name}" if step < len(instructions) else ""
        grid = draw(self.tracks({pp: marked})) if instructions else ""
        raise ProgramError(f"{self.where(pp)}, step {step}{name}: {what}\n{grid}".rstrip(), hint=hint)

    def tracks(self, marked: Mapping[int, int]) -> list[Track]:
        """The column's ranks for the grid."""
        rows = [row.instructions for row in self.rows]
        times = times_of(rows, self.program.stage_ranks)
        return [
            Track(rank=self.rank(pp), instructions=rows[pp], times=times[pp], marked=marked.get(pp))
            for pp in range(len(rows))
        ]

    @cached_property
    def step_of(self) -> Mapping[tuple[str, int | None, int | None, int | None], int]:
        """The step of each act by (kind, stage, microbatch, peer), on the rank of its stage."""
        return {
            (i.kind, i.stage, i.microbatch, i.peer): step
            for row in self.rows
            for step, i in enumerate(row.instructions)
            if i.stage is not None
        }

    @cached_property
    def calls(self) -> tuple[Mapping[str, tuple[Call, ...]], ...]:
        """By pp and axis: the collectives in order."""
        found: list[Mapping[str, tuple[Call, ...]]] = []
        for pp in range(len(self.rows)):
            by_axis: dict[str, list[Call]] = {}
            for step, instruction in self.steps(pp):
                for collective in self.program.collectives(instruction):
                    by_axis.setdefault(collective.axis, []).append(Call(step, collective))
            found.append({axis: tuple(calls) for axis, calls in by_axis.items()})
        return tuple(found)


@dataclass(frozen=True, kw_only=True, eq=False)
class Fold:
    """One column of each kind, and which kinds are in the group of a kind along tp and dp (itself included)."""

    program: Program
    columns: tuple[Column, ...]
    along: Mapping[str, tuple[tuple[int, ...], ...]]

    def members(self, kind: int, pp: int, axis: str) -> tuple[tuple[int, int], ...]:
        """The (kind, pp) of the group that a rank of this kind is in: one for all that act alike."""
        if axis == "world":
            return tuple((k, p) for k in range(len(self.columns)) for p in range(self.program.mesh.pp))
        if axis in self.along:
            return tuple((k, pp) for k in self.along[axis][kind])
        return tuple((kind, tied) for tied in tied_ranks(axis))


def tied_ranks(axis: str) -> tuple[int, ...]:
    """The pipeline ranks of ``tie0+3``."""
    return tuple(map(int, axis.removeprefix("tie").split("+")))


def fold_of(program: Program) -> Fold:
    """Tells the program's columns apart; linear in the ranks times the number of rounds, which is small."""
    mesh = program.mesh
    number = {id(row): at for at, row in enumerate(program.rows)}
    rows = {
        (dp, tp): tuple(program.row_of(mesh.rank(pp=pp, dp=dp, tp=tp)) for pp in range(mesh.pp))
        for dp in range(mesh.dp)
        for tp in range(mesh.tp)
    }
    kinds = _numbered({at: tuple(number[id(row)] for row in held) for at, held in rows.items()})
    while True:
        groups = {axis: _groups(kinds, axis) for axis in ("dp", "tp")}
        finer = _numbered(
            {(dp, tp): (kind, groups["tp"][dp], groups["dp"][tp]) for (dp, tp), kind in kinds.items()}
        )
        if len(set(finer.values())) == len(set(kinds.values())):
            break
        kinds = finer
    first: dict[int, tuple[int, int]] = {}
    for at, kind in kinds.items():
        first.setdefault(kind, at)
    places = [first[kind] for kind in sorted(first)]
    return Fold(
        program=program,
        columns=tuple(Column(program=program, dp=dp, tp=tp, rows=rows[dp, tp]) for dp, tp in places),
        along={
            "tp": tuple(groups["tp"][dp] for dp, _ in places),
            "dp": tuple(groups["dp"][tp] for _, tp in places),
        },
    )


def _groups(kinds: Mapping[tuple[int, int], int], axis: str) -> Mapping[int, tuple[int, ...]]:
    """The kinds in each group along an axis, by the coordinate on the other."""
    found: dict[int, set[int]] = {}
    for (dp, tp), kind in kinds.items():
        found.setdefault(dp if axis == "tp" else tp, set()).add(kind)
    return {at: tuple(sorted(group)) for at, group in found.items()}


def _numbered(colours: Mapping[tuple[int, int], object]) -> dict[tuple[int, int], int]:
    numbers: dict[object, int] = {}
    return {at: numbers.setdefault(colour, len(numbers)) for at, colour in colours.items()}
