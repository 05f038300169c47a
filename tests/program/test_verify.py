"""``verify`` passes what lowering makes, and refuses every single corruption that changes the meaning."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardstage.errors import ProgramError
from shardstage.graph.cuts import Edge
from shardstage.layout import Mesh
from shardstage.plan.plan import Plan, StageRange
from shardstage.program import Instruction, Program, verify
from shardstage.program.lower import _instructions

CHAIN = ((0, 1), (1, 2), (2, 3))
SKIP = (*CHAIN, (0, 3))


def program(ends: Sequence[tuple[int, int]], *, schedule: Any = "1f1b", microbatches: int = 5) -> Program:
    num_stages = max(target for _, target in ends) + 1
    edges = tuple(
        Edge(value=f"v{i}", source=s, target=t, requires_grad=True) for i, (s, t) in enumerate(ends)
    )
    plan = Plan(
        mesh=Mesh(pp=num_stages),
        stages=tuple(StageRange(first=f"op{s}", last=f"op{s}") for s in range(num_stages)),
        global_batch=microbatches,
        sequence=None,
        microbatch=1,
        shares=(microbatches,),
        schedule=schedule,
    )
    return Program(plan=plan, instructions=_instructions(plan, edges), edges=edges, sharding_at=_never)


def _never(_microbatch: int) -> Any:
    raise AssertionError("verification reads instructions only")


def with_row(whole: Program, stage: int, row: Sequence[Instruction]) -> Program:
    rows = list(whole.instructions)
    rows[stage] = tuple(row)
    return replace(whole, instructions=tuple(rows))


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("ends", [CHAIN, SKIP], ids=["chain", "skip"])
@settings(deadline=None)
@given(microbatches=st.integers(1, 9))
def test_lowered_programs_verify(schedule: str, ends: tuple[tuple[int, int], ...], microbatches: int) -> None:
    verify(program(ends, schedule=schedule, microbatches=microbatches))


def test_a_skip_goes_straight_to_the_stage_that_needs_it() -> None:
    assert "0SEND_F0>3" in str(program(SKIP)).split()
    assert "3SEND_B0>0" in str(program(SKIP)).split()


def test_an_edge_without_gradient_sends_nothing_back() -> None:
    whole = program(CHAIN)
    silent = tuple(replace(e, requires_grad=False) if e.source == 0 else e for e in whole.edges)
    rows = _instructions(whole.plan, silent)
    assert not [i for i in rows[1] if i.kind == "SEND_B"]
    verify(replace(whole, edges=silent, instructions=rows))


@pytest.mark.parametrize("seed", range(300))
def test_a_dropped_or_doubled_or_moved_instruction_is_caught(seed: int) -> None:
    draw = random.Random(seed)
    whole = program(draw.choice((CHAIN, SKIP)), schedule=draw.choice(("gpipe", "1f1b")))
    stage = draw.randrange(len(whole.instructions))
    row = list(whole.instructions[stage])
    at = draw.randrange(len(row))
    match draw.choice(("drop", "double", "readdress", "renumber")):
        case "drop":
            del row[at]
        case "double":
            row.insert(at, row[at])
        case "readdress":
            at = next(i for i, x in enumerate(row) if x.peer is not None)
            row[at] = replace(row[at], peer=(row[at].peer or 0) + 1)
        case _:
            at = next(i for i, x in enumerate(row) if x.microbatch is not None)
            row[at] = replace(row[at], microbatch=(row[at].microbatch or 0) + 1)
    with pytest.raises(ProgramError):
        verify(with_row(whole, stage, row))


def test_a_deadlock_is_found_and_its_place_named() -> None:
    whole = program(CHAIN, microbatches=1)
    row = list(whole.instructions[1])
    send, receive = row.index(Instruction.parse("1SEND_F0>2")), row.index(Instruction.parse("1RECV_B0<2"))
    row[send], row[receive] = row[receive], row[send]
    with pytest.raises(ProgramError, match=r"never comes: .*stage 1 at step \d+: 1RECV_B0<2"):
        verify(with_row(whole, 1, row))


def test_a_step_before_the_reduction_is_refused() -> None:
    whole = program(CHAIN)
    row = list(whole.instructions[0])
    row[-1], row[-2] = row[-2], row[-1]
    with pytest.raises(ProgramError, match="ends with 0STEP 0REDUCE_GRAD"):
        verify(with_row(whole, 0, row))


def test_an_instruction_of_another_stage_is_refused() -> None:
    whole = program(CHAIN)
    row = list(whole.instructions[0])
    row[0] = replace(row[0], stage=1)
    with pytest.raises(ProgramError, match="stands in the row of stage 0"):
        verify(with_row(whole, 0, row))
