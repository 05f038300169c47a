"""``verify``: the static proof that a Program's instructions fit together."""

from __future__ import annotations

from collections import Counter

from shardstage.errors import ProgramError
from shardstage.program.instruction import Instruction
from shardstage.program.program import Program

__all__ = ["verify"]


def verify(program: Program) -> None:
    """Returns if every rank can run to its end and nothing is lost or done twice; raises ``ProgramError`` otherwise.

    Checked: every microbatch passes forward and backward once on every stage; every SEND meets one RECV between the same stages;
    a RECV waits only for what its peer will send (no deadlock when RECV blocks and SEND does not); backward follows forward; the
    gradients are reduced once, after the last backward, and then the parameters stepped once.
    """
    for stage, row in enumerate(program.instructions):
        _check_row(program, stage, row)
    _check_transfers(program)
    _run_to_the_end(program)


def _check_row(program: Program, stage: int, row: tuple[Instruction, ...]) -> None:
    expected: Counter[tuple[str, int | None]] = Counter(
        [(kind, m) for kind in ("F", "B") for m in range(program.plan.num_microbatches)]
    )
    expected.update([("REDUCE_GRAD", None), ("STEP", None)])
    counted: Counter[tuple[str, int | None]] = Counter(
        (i.kind, i.microbatch) for i in row if not i.kind.startswith(("SEND", "RECV"))
    )
    for kind, microbatch in expected | counted:
        if counted[kind, microbatch] != expected[kind, microbatch]:
            where = "" if microbatch is None else f" of microbatch {microbatch}"
            raise ProgramError(
                f"stage {stage} runs {kind}{where} {counted[kind, microbatch]} times, not {expected[kind, microbatch]}"
            )
    if any(i.stage != stage for i in row):
        wrong = next(i for i in row if i.stage != stage)
        raise ProgramError(f"{wrong} stands in the row of stage {stage}")
    if [i.kind for i in row[-2:]] != ["REDUCE_GRAD", "STEP"]:
        raise ProgramError(f"stage {stage} ends with {row[-2]} {row[-1]}, not with REDUCE_GRAD STEP")


def _check_transfers(program: Program) -> None:
    sends = Counter(_message(i) for row in program.instructions for i in row if i.kind.startswith("SEND"))
    receives = Counter(_message(i) for row in program.instructions for i in row if i.kind.startswith("RECV"))
    for message in sends | receives:
        if not sends[message] == receives[message] == 1:
            source, target, direction, microbatch = message
            raise ProgramError(
                f"microbatch {microbatch} goes {sends[message]} times from stage {source} and arrives {receives[message]} times "
                f"at stage {target} ({'activations' if direction == 'F' else 'gradients'})"
            )


def _run_to_the_end(program: Program) -> None:
    """Executes the rows abstractly: a RECV waits for its SEND, a B for its F, a SEND needs what it sends."""
    position = [0] * len(program.instructions)
    sent: set[tuple[int, int, str, int | None]] = set()
    done: set[Instruction] = set()
    is_moving = True
    while is_moving:
        is_moving = False
        for stage, row in enumerate(program.instructions):
            while position[stage] < len(row) and _can_run(program, row[position[stage]], sent, done):
                instruction = row[position[stage]]
                done.add(instruction)
                if instruction.kind.startswith("SEND"):
                    sent.add(_message(instruction))
                position[stage] += 1
                is_moving = True
    waiting = [
        f"stage {stage} at step {position[stage]}: {row[position[stage]]}"
        for stage, row in enumerate(program.instructions)
        if position[stage] < len(row)
    ]
    if waiting:
        raise ProgramError(f"what is waited for never comes: {', '.join(waiting)}")


def _can_run(
    program: Program,
    instruction: Instruction,
    sent: set[tuple[int, int, str, int | None]],
    done: set[Instruction],
) -> bool:
    stage, kind, microbatch = instruction.stage, instruction.kind, instruction.microbatch
    if kind.startswith("RECV"):
        return _message(instruction) in sent
    if kind.startswith("SEND"):
        return Instruction(stage, "F" if kind == "SEND_F" else "B", microbatch) in done
    if kind == "F":
        sources = {e.source for e in program.edges if e.target == stage}
        return all(Instruction(stage, "RECV_F", microbatch, peer) in done for peer in sources)
    if kind == "B":
        targets = {e.target for e in program.edges if e.source == stage and e.requires_grad}
        has_gradients = all(Instruction(stage, "RECV_B", microbatch, peer) in done for peer in targets)
        return has_gradients and Instruction(stage, "F", microbatch) in done
    return True


def _message(instruction: Instruction) -> tuple[int, int, str, int | None]:
    """(from stage, to stage, F or B, microbatch) of a SEND or RECV."""
    assert instruction.peer is not None
    ends = (instruction.stage, instruction.peer)
    source, target = ends if instruction.kind.startswith("SEND") else ends[::-1]
    return source, target, instruction.kind[-1], instruction.microbatch
