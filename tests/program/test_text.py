"""The text of programs: read back exactly, and refused with the line where it is wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.program.hand_written import PIPELINE, SHARDED
from tests.program.programs import CASES, program_of

from shardstage.errors import ProgramError
from shardstage.graph.cuts import Edge
from shardstage.layout import Mesh
from shardstage.program import Collective, TensorType, format_program, parse_program

WRONG = {
    "shardstage program 1": (
        "shardstage program 9",
        "line 1: 'shardstage program 9' does not begin a program",
    ),
    "mesh pp=2 dp=2 tp=2": ("mesh pp=2 dp=2", "line 2: mesh is followed by 2 words and not by 3"),
    "dp=2 tp=2": ("tp=2 dp=2", "line 2: 'tp=2' stands where dp=… does"),
    "pp=2 dp=2 tp=2": ("pp=0 dp=2 tp=2", "line 2: an axis of 0 ranks"),
    "schedule 1f1b": ("schedules 1f1b", "line 3: 'schedules' is not a section"),
    "  dp=1 2 1": ("  dp=0 2 1", "line 6: dp=0 is there twice"),
    "  dp=1 2 1\n": ("", "line 4: dp=1 has no microbatches"),
    "dp=1 2 1": ("dp=1 2 one", "line 6: 'one' is not a number of samples"),
    "0=pp0 1=pp1": ("1=pp1 0=pp0", "line 7: '1=pp1' stands where stage 0 does"),
    "stages 0=pp0 1=pp1": ("stages", "line 7: no stages"),
    "x 0>1 grad": ("x 0>1 gradient", "line 9: an edge is a value, the two stages"),
    "mask 0>1": ("mask 0->1", "line 10: '0->1' is not a pair of stages"),
    "m1 x:float32[2,8]": ("m1 x:float32[2,8", "line 13: 'x:float32.2,8' is not a tensor"),
    "m3 x": ("m1 x", "line 15: m1 is there twice"),
    "c1 2*tp": ("c-1 2*tp", "line 18: 'c-1' is not a name"),
    "2*tp.all_reduce:float32[16]": ("2*cp.all_reduce:float32[16]", "line 18: .* is not a collective"),
    "stages=1 frozen": ("stages=1 melted", "line 36: parameter second.table wants stages=…"),
    "pp=0 dp=1 tp=*": ("pp=0 dp=2 tp=*", "line 41: 'dp=2' does not lie within dp=0-1"),
    "pp=1 dp=1 tp=*": ("pp=1 dp=1- tp=*", "line 47: 'dp=1-' are no coordinates"),
    "  pp=1 dp=1 tp=*\n": ("  pp=1\n", "line 48: .* stands where dp=… does"),
    "1RECV_F1<0(m2)": ("1RECV_F1>0(m2)", "line 48: '1RECV_F1>0.m2.' is not an instruction: '>' does not go"),
    "rows\n": ("", "line 48: the program ends without rows"),
    "edges\n": ("edges\nedges\n", "line 9: 'edges' is there twice"),
    "mesh pp=2": ("  mesh pp=2", "line 2: this belongs to no section"),
}


@pytest.mark.parametrize("name", CASES)
def test_lowered_programs_are_read_back_exactly(name: str) -> None:
    program = program_of(name)
    text = format_program(program)
    assert parse_program(text) == program
    assert format_program(parse_program(text)) == text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("text", [PIPELINE, SHARDED], ids=["pipeline", "sharded"])
def test_a_program_written_by_hand_survives_formatting(text: str) -> None:
    assert parse_program(format_program(parse_program(text))) == parse_program(text)


def test_blank_lines_comments_and_other_breaks_mean_nothing() -> None:
    lines = PIPELINE.replace("0F1[c1] 0SEND_F1>1(m0)", "0F1[c1]   # the second\n    0SEND_F1>1(m0)")
    assert parse_program(lines.replace("edges\n", "\n# what crosses\nedges\n")) == parse_program(PIPELINE)


def test_neighbours_that_act_alike_are_folded() -> None:
    program = parse_program(PIPELINE)
    row = replace(program.rows[0], dp=(0, 1, 2, 5, 7, 8), tp=(0, 1))
    wide = replace(
        program, mesh=Mesh(pp=2, dp=9, tp=2), samples=((2, 2),) * 8 + ((1, 1),), rows=(row, *program.rows[2:])
    )
    text = format_program(wide)
    assert "  dp=0-7 2*2\n  dp=8 2*1\n" in text
    assert "  pp=0 dp=0-2,5,7-8 tp=*\n" in text
    assert "  c1 2*tp.all_reduce:float32[16]\n" in text
    assert parse_program(text) == wide


@given(
    name=st.text(min_size=1),
    shape=st.lists(st.integers(0, 99), max_size=4),
    numel=st.integers(0, 2**40),
    count=st.integers(1, 99),
)
def test_names_of_any_letters_and_tensors_of_any_shape_are_read_back(
    name: str, shape: list[int], numel: int, count: int
) -> None:
    program = parse_program(PIPELINE)
    call = Collective("tie0+1", "all_gather", "bfloat16", numel, "b0")
    strange = replace(
        program,
        schedule=name,
        edges=(Edge(value=name, source=0, target=1, requires_grad=False),),
        messages={"m0": (TensorType(name, "int64", tuple(shape)),)},
        calls={"c0": (call,) * count},
        buckets={"b0": (name, name)},
        parameters=(replace(program.parameters[0], fqn=name, is_trained=False),),
    )
    assert parse_program(format_program(strange)) == strange


@pytest.mark.parametrize("old", WRONG)
def test_a_wrong_line_is_named_with_a_right_example(old: str) -> None:
    new, message = WRONG[old]
    assert old in PIPELINE
    with pytest.raises(ProgramError, match=message) as refused:
        parse_program(PIPELINE.replace(old, new, 1))
    assert refused.value.hint


def test_nothing_is_no_program() -> None:
    with pytest.raises(ProgramError, match="line 1: nothing does not begin a program"):
        parse_program("")
