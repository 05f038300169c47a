"""``Instruction``: one act of one rank."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, cast, get_args

from shardstage.errors import ProgramError

__all__ = ["Instruction", "InstructionKind"]

InstructionKind = Literal["F", "B", "SEND_F", "RECV_F", "SEND_B", "RECV_B", "REDUCE_GRAD", "STEP"]
_TEXT = re.compile(
    rf"(\d+)({'|'.join(sorted(get_args(InstructionKind), key=len, reverse=True))})(\d+)?(?:([<>])(\d+))?"
)


@dataclass(frozen=True, slots=True)
class Instruction:
    """One act of the rank of ``stage``.

    F and B compute on ``microbatch``; SEND and RECV move all values that cross between ``stage`` and ``peer``: activations (F) or
    their gradients (B). REDUCE_GRAD finishes the gradient reductions that began under the last backward, STEP updates the
    parameters. As text: ``0F3``, ``0SEND_F3>1``, ``1RECV_F3<0``, ``0REDUCE_GRAD``.
    """

    stage: int
    kind: InstructionKind
    microbatch: int | None = None
    peer: int | None = None

    def __str__(self) -> str:
        microbatch = "" if self.microbatch is None else str(self.microbatch)
        arrow = "" if self.peer is None else f"{'>' if self.kind.startswith('SEND') else '<'}{self.peer}"
        return f"{self.stage}{self.kind}{microbatch}{arrow}"

    @staticmethod
    def parse(text: str) -> Instruction:
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ProgramError(
                f"{text!r} is not an instruction", hint="0F3, 0SEND_F3>1, 1RECV_F3<0, 0REDUCE_GRAD or 0STEP"
            )
        stage, kind, microbatch, arrow, peer = match.groups()
        instruction = Instruction(
            int(stage),
            cast("InstructionKind", kind),
            None if microbatch is None else int(microbatch),
            None if peer is None else int(peer),
        )
        if str(instruction) != text:
            raise ProgramError(
                f"{text!r} is not an instruction: {arrow!r} does not go with {kind}", hint=str(instruction)
            )
        return instruction
