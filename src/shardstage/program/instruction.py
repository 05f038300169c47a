"""``Instruction``: one act of one rank."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, cast, get_args

from shardstage.errors import ProgramError

__all__ = ["COMPUTATIONS", "Instruction", "InstructionKind"]

InstructionKind = Literal[
    "COUNT", "F", "B", "I", "W", "SEND_F", "RECV_F", "SEND_B", "RECV_B",
    "UNSHARD", "RESHARD", "REDUCE_GRAD", "STEP",
]  # fmt: skip

COMPUTATIONS: frozenset[InstructionKind] = frozenset({"F", "B", "I", "W"})
"""What a schedule orders: forward, backward, and its halves by input and by weight."""

_WHOLE_RANK: frozenset[InstructionKind] = frozenset({"COUNT", "REDUCE_GRAD", "STEP"})
_TEXT = re.compile(
    rf"(\d+)?({'|'.join(sorted(get_args(InstructionKind), key=len, reverse=True))})(\d+)?(?:([<>])(\d+))?"
    r"(?:\((\w+)\))?(?:\[(\w+)\])?"
)


@dataclass(frozen=True, slots=True)
class Instruction:
    """One act of a rank, for one of its stages.

    F, B, I and W compute on ``microbatch``. SEND and RECV move the tensors of ``message`` between ``stage`` and ``peer``, another stage:
    activations (F) or their gradients (B). UNSHARD gathers a stage's parameters over dp and RESHARD frees what was gathered.
    COUNT sums the target tokens of the global batch, REDUCE_GRAD finishes the gradient reductions that began under the stages' last
    backwards, STEP updates the parameters: these are for all stages of the rank.

    ``message`` and ``calls`` are names of the Program's tables: what travels, and the collectives that the act runs in order.

    As text: ``0F3[c0]``, ``0SEND_F3>1(m0)``, ``1RECV_F3<0(m0)``, ``REDUCE_GRAD[c4]``, ``STEP[c5]``.
    """

    stage: int | None
    kind: InstructionKind
    microbatch: int | None = None
    peer: int | None = None
    message: str = ""
    calls: str = ""

    def __str__(self) -> str:
        message = f"({self.message})" if self.message else ""
        calls = f"[{self.calls}]" if self.calls else ""
        return f"{self.name}{message}{calls}"

    @property
    def name(self) -> str:
        """The act without its tables: ``0SEND_F3>1``."""
        stage = "" if self.stage is None else str(self.stage)
        microbatch = "" if self.microbatch is None else str(self.microbatch)
        arrow = "" if self.peer is None else f"{'>' if self.is_send else '<'}{self.peer}"
        return f"{stage}{self.kind}{microbatch}{arrow}"

    @property
    def is_send(self) -> bool:
        return self.kind in ("SEND_F", "SEND_B")

    @property
    def is_receive(self) -> bool:
        return self.kind in ("RECV_F", "RECV_B")

    @property
    def is_computation(self) -> bool:
        return self.kind in COMPUTATIONS

    @staticmethod
    def parse(text: str) -> Instruction:
        """The instruction that a text writes; raises ``ProgramError`` with the nearest right form."""
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ProgramError(
                f"{text!r} is not an instruction",
                hint="0F3, 0SEND_F3>1(m0), 1RECV_F3<0(m0), REDUCE_GRAD or STEP",
            )
        stage, kind, microbatch, arrow, peer, message, calls = match.groups()
        instruction = Instruction(
            None if stage is None else int(stage),
            cast("InstructionKind", kind),
            None if microbatch is None else int(microbatch),
            None if peer is None else int(peer),
            message or "",
            calls or "",
        )
        _require_whole(instruction, text, arrow)
        return instruction


def _require_whole(instruction: Instruction, text: str, arrow: str | None) -> None:
    """Refuses a text in which a part is missing or stands where it means nothing."""
    kind, moves = instruction.kind, instruction.is_send or instruction.is_receive
    problem = ""
    if (instruction.stage is None) != (kind in _WHOLE_RANK):
        problem = f"{kind} is for {'the whole rank' if kind in _WHOLE_RANK else 'one stage'}"
    elif (instruction.microbatch is None) == (instruction.is_computation or moves):
        problem = (
            f"{kind} is for {'one microbatch' if instruction.microbatch is None else 'all microbatches'}"
        )
    elif (instruction.peer is None) == moves or (moves and not instruction.message):
        problem = f"{kind} names {'a peer and a message' if moves else 'no peer'}"
    elif arrow is not None and arrow != (">" if instruction.is_send else "<"):
        problem = f"{arrow!r} does not go with {kind}"
    elif instruction.message and not moves:
        problem = f"{kind} moves no message"
    if problem:
        raise ProgramError(
            f"{text!r} is not an instruction: {problem}",
            hint="0F3, 0SEND_F3>1(m0), 1RECV_F3<0(m0), REDUCE_GRAD or STEP",
        )
