"""``compare_with_program``: what a rank did in its dry run, held against what the Program says it does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from shardstage.program import Collective, Instruction, Program
from shardstage.runtime.dry_run import DryRun
from shardstage.runtime.dry_run_recorder import Sent
from shardstage.runtime.transfers import early_receives

__all__ = ["Difference", "compare_with_program", "distinct_ranks"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """The first thing that a rank did and the Program does not say, or the other way round; nothing is an empty text."""

    rank: int
    instruction: Instruction
    expected: str
    found: str

    def __str__(self) -> str:
        said, did = self.expected or "nothing more", self.found or "nothing more"
        return f"rank {self.rank}, {self.instruction.name}: the Program says {said}, the engine did {did}"


def compare_with_program(run: DryRun, program: Program) -> Difference | None:
    """The first difference in collectives, sends or receives; ``None`` where there is none.

    Of each instruction the collectives are compared in order, by axis, kind, dtype and elements; those that reduce gradients over dp may
    begin under a stage's last backward, still in order. An instruction that was not executed is compared by its twin.
    """
    return next(
        (
            Difference(rank=run.rank, instruction=instruction, expected=expected, found=found)
            for instruction, expected, found in _differences(run, program)
        ),
        None,
    )


def distinct_ranks(program: Program) -> tuple[int, ...]:
    """One rank of each class of ranks that act alike: the first of each row."""
    return tuple(program.mesh.rank(pp=row.pp, dp=row.dp[0], tp=row.tp[0]) for row in program.rows)


def _differences(run: DryRun, program: Program) -> Iterator[tuple[Instruction, str, str]]:
    begun: list[Collective] = []
    for instruction, act in zip(run.row, run.twins, strict=True):
        expected = tuple(map(_without_bucket, program.collectives(instruction)))
        found = act.collectives
        if instruction.is_computation and act.instruction == instruction:
            found, early = _reductions_apart(found, expected)
            begun += early
        elif instruction.is_computation:
            found, _ = _reductions_apart(found, expected)
        elif instruction.kind == "REDUCE_GRAD":
            found = (*begun, *found)
        yield from ((instruction, e, f) for e, f in _unequal(expected, found))
        if instruction.is_send:
            yield from (
                (instruction, e, f) for e, f in _unequal(_messages(program, run.rank, instruction), act.sent)
            )
    yield from _differences_of_receives(run, program)


def _reductions_apart(
    found: Sequence[Collective], expected: Sequence[Collective]
) -> tuple[tuple[Collective, ...], tuple[Collective, ...]]:
    """What a computation ran for itself, and the reductions of gradients over dp that began under it."""
    if any(call.axis == "dp" for call in expected):
        return tuple(found), ()
    own = tuple(call for call in found if call.axis != "dp")
    return own, tuple(call for call in found if call.axis == "dp")


def _differences_of_receives(run: DryRun, program: Program) -> Iterator[tuple[Instruction, str, str]]:
    """Receives begin ahead of their instruction, in the order in which they were begun."""
    row = tuple(i for i in run.row if i.microbatch is None or i.microbatch in run.executed)
    order = dict.fromkeys(i for position in range(len(row)) for i in early_receives(row, position))
    expected = [(i, message) for i in order for message in _messages(program, run.rank, i)]
    last = next(reversed(order), row[-1])
    for pair, found in zip_longest(expected, run.received):
        instruction, message = pair or (last, None)
        if message != found:
            yield instruction, _text(message), _text(found)


def _messages(program: Program, rank: int, instruction: Instruction) -> tuple[Sent, ...]:
    assert instruction.peer is not None
    mesh = program.mesh
    peer = mesh.rank(
        pp=program.stage_ranks[instruction.peer],
        dp=mesh.coordinate(rank, "dp"),
        tp=mesh.coordinate(rank, "tp"),
    )
    return tuple(Sent(peer, tensor.dtype, tensor.shape) for tensor in program.tensors(instruction))


def _unequal(
    expected: Sequence[Collective | Sent], found: Sequence[Collective | Sent]
) -> Iterator[tuple[str, str]]:
    for number, (one, other) in enumerate(zip_longest(expected, found), start=1):
        if one != other:
            where = f" as number {number}" if max(len(expected), len(found)) > 1 else ""
            yield f"{_text(one)}{where}" if one else "", f"{_text(other)}{where}" if other else ""


def _without_bucket(call: Collective) -> Collective:
    return Collective(call.axis, call.kind, call.dtype, call.numel)


def _text(found: Collective | Sent | None) -> str:
    if isinstance(found, Collective):
        return f"{found.axis}.{found.kind} {found.dtype}[{found.numel}]"
    return "" if found is None else str(found)
