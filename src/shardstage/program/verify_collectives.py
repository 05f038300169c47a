"""Every group sees the same collectives in the same order, run by the same acts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import zip_longest

from shardstage.program.program import Collective, Program
from shardstage.program.verify_fold import Call, Column, Fold

__all__ = ["check_alike_microbatches", "check_collectives"]


def check_collectives(fold: Fold) -> None:
    """The ranks of each group (tp, dp, ties, world) run equal collectives in equal order: kind, dtype, numel, bucket, and for what.

    Bucket reductions that begin under the last backward do so in the order of REDUCE_GRAD, so that they need no check of their own.
    """
    program = fold.program
    axes = {call.axis for calls in program.calls.values() for call in calls}
    for kind, column in enumerate(fold.columns):
        for pp in range(program.mesh.pp):
            for axis in sorted(axes):
                members = fold.members(kind, pp, axis)
                if (kind, pp) not in members:
                    if axis in column.calls[pp]:
                        step = column.calls[pp][axis][0].step
                        column.refuse(
                            pp, step, f"runs a collective over {axis}, which it is not in", hint=axis
                        )
                    continue
                first = members[0]
                if first != (kind, pp):
                    _compare((fold.columns[first[0]], first[1]), (column, pp), axis)


def _compare(left: tuple[Column, int], right: tuple[Column, int], axis: str) -> None:
    """Refuses the first difference between the sequences of two ranks of a group."""
    columns, pps = (left[0], right[0]), (left[1], right[1])
    sequences = [column.calls[pp].get(axis, ()) for column, pp in (left, right)]
    if columns[0].rows[pps[0]] is columns[1].rows[pps[1]]:
        return
    for mine, other in zip_longest(*sequences[::-1]):
        if _meaning(columns[1], pps[1], mine) == _meaning(columns[0], pps[0], other):
            continue
        step = mine.step if mine else len(columns[1].rows[pps[1]].instructions)
        columns[1].refuse(
            pps[1],
            step,
            f"runs {_describe(columns[1], pps[1], mine)} over {axis}, and {columns[0].where(pps[0])} there "
            f"{_describe(columns[0], pps[0], other)}",
            hint=_text(other.collective) if other else f"delete {_text(mine.collective)}",
        )


def _meaning(column: Column, pp: int, call: Call | None) -> object:
    """What must be equal: the collective, what its bucket carries, and the act that it is for."""
    if call is None:
        return None
    collective, i = call.collective, column.rows[pp].instructions[call.step]
    carried = column.program.buckets[collective.bucket] if collective.bucket else ()
    stage = i.stage if collective.axis in ("tp", "dp") else None
    return collective.kind, collective.dtype, collective.numel, carried, i.kind, stage, i.microbatch


def _describe(column: Column, pp: int, call: Call | None) -> str:
    if call is None:
        return "nothing more"
    return f"{_text(call.collective)} of {column.rows[pp].instructions[call.step].name} (step {call.step})"


def _text(call: Collective) -> str:
    bucket = f"{{{call.bucket}}}" if call.bucket else ""
    return f"{call.axis}.{call.kind}:{call.dtype}[{call.numel}]{bucket}"


def check_alike_microbatches(fold: Fold) -> None:
    """A stage runs the same collectives for every microbatch, of the same size for those of as many samples; I those of B."""
    program = fold.program
    known: dict[tuple[int | None, str, int, int], tuple[Collective, ...]] = {}
    shapes: dict[tuple[int | None, str], tuple[Collective, ...]] = {}
    for column in fold.columns:
        for pp, step, key in _computations(program, column):
            i = column.rows[pp].instructions[step]
            calls = program.collectives(i)
            sizeless = tuple(replace(call, numel=0) for call in calls)
            expected = known.setdefault(key, calls)
            if calls != expected or sizeless != shapes.setdefault(key[:2], sizeless):
                column.refuse(
                    pp,
                    step,
                    f"runs {len(calls)} collectives and for another microbatch {len(shapes[key[:2]])}, or others",
                    hint=" ".join(map(_text, expected)) or f"{i.name} without collectives",
                )


def _computations(
    program: Program, column: Column
) -> Iterator[tuple[int, int, tuple[int | None, str, int, int]]]:
    """Rank, step and what decides of the collectives of F, B and I."""
    sizes = program.samples[column.dp]
    for pp in range(program.mesh.pp):
        for step, i in column.steps(pp):
            if i.kind in ("F", "B", "I") and i.microbatch is not None:
                yield pp, step, (i.stage, "F" if i.kind == "F" else "B", sizes[i.microbatch], column.tp)
