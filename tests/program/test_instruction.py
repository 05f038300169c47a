"""The text of instructions."""

from __future__ import annotations

import pytest

from shardstage.errors import ProgramError
from shardstage.program import Instruction

EXAMPLES = {
    "COUNT[c0]": Instruction(None, "COUNT", calls="c0"),
    "0F3": Instruction(0, "F", 3),
    "0F3[c1]": Instruction(0, "F", 3, calls="c1"),
    "2B0": Instruction(2, "B", 0),
    "1I4[c2]": Instruction(1, "I", 4, calls="c2"),
    "1W4": Instruction(1, "W", 4),
    "0SEND_F3>1(m0)": Instruction(0, "SEND_F", 3, 1, "m0"),
    "1RECV_F3<0(m0)": Instruction(1, "RECV_F", 3, 0, "m0"),
    "1SEND_B12>0(m3)": Instruction(1, "SEND_B", 12, 0, "m3"),
    "0RECV_B12<1(m3)": Instruction(0, "RECV_B", 12, 1, "m3"),
    "0UNSHARD[c1]": Instruction(0, "UNSHARD", calls="c1"),
    "0RESHARD": Instruction(0, "RESHARD"),
    "REDUCE_GRAD": Instruction(None, "REDUCE_GRAD"),
    "STEP[c5]": Instruction(None, "STEP", calls="c5"),
}
WRONG = {
    "": "is not an instruction",
    "F0": "F is for one stage",
    "0JUMP": "is not an instruction",
    "0F3>>1": "is not an instruction",
    "0F": "F is for one microbatch",
    "3STEP": "STEP is for the whole rank",
    "0RESHARD2": "RESHARD is for all microbatches",
    "0SEND_F3>1": "SEND_F names a peer and a message",
    "0SEND_F3(m0)": "SEND_F names a peer and a message",
    "0SEND_F3<1(m0)": "'<' does not go with SEND_F",
    "0F3>1": "F names no peer",
    "0F3(m0)": "F moves no message",
}


@pytest.mark.parametrize("text", EXAMPLES)
def test_an_instruction_reads_and_writes_its_text(text: str) -> None:
    assert Instruction.parse(text) == EXAMPLES[text]
    assert str(EXAMPLES[text]) == text


def test_the_name_of_an_instruction_is_its_text_without_tables() -> None:
    assert Instruction.parse("0SEND_F3>1(m0)").name == "0SEND_F3>1"
    assert Instruction.parse("STEP[c5]").name == "STEP"


@pytest.mark.parametrize("text", WRONG)
def test_what_is_no_instruction_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ProgramError, match=WRONG[text]) as refused:
        Instruction.parse(text)
    assert refused.value.hint
