"""The text of instructions."""

from __future__ import annotations

import pytest

from shardstage.errors import ProgramError
from shardstage.program import Instruction

EXAMPLES = {
    "0F3": Instruction(0, "F", 3),
    "2B0": Instruction(2, "B", 0),
    "0SEND_F3>1": Instruction(0, "SEND_F", 3, 1),
    "1RECV_F3<0": Instruction(1, "RECV_F", 3, 0),
    "1SEND_B12>0": Instruction(1, "SEND_B", 12, 0),
    "0RECV_B12<1": Instruction(0, "RECV_B", 12, 1),
    "0REDUCE_GRAD": Instruction(0, "REDUCE_GRAD"),
    "3STEP": Instruction(3, "STEP"),
}


@pytest.mark.parametrize("text", EXAMPLES)
def test_an_instruction_reads_and_writes_its_text(text: str) -> None:
    assert Instruction.parse(text) == EXAMPLES[text]
    assert str(EXAMPLES[text]) == text


@pytest.mark.parametrize("text", ["", "F0", "0SEND_F3<1", "0JUMP", "0F3>>1"])
def test_what_is_no_instruction_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ProgramError, match="is not an instruction") as refused:
        Instruction.parse(text)
    assert refused.value.hint
