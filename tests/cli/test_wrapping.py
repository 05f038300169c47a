"""Eighty columns: nothing is broken in mid-word where it can be avoided, and what is broken can be pasted."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.table import Table

from shardstage.cli.wrapping import PlanText, say
from shardstage.plan import parse_request

LONG = "dp=128,pp=2,zero=3,mb=1,recompute=full:6+selective:13,cp=2,schedule=zb-v,v=2"


@pytest.mark.parametrize("width", [12, 40, 52, 75, 76, 100])
def test_a_plan_breaks_after_commas_and_can_be_pasted_so(width: int) -> None:
    lines = [*PlanText(LONG).lines(width)]
    assert "".join(lines) == LONG
    assert all(line.endswith(",") for line in lines[:-1])
    assert all(len(line) <= max(width, len("recompute=full:6+selective:13,")) for line in lines)
    assert parse_request("\n ".join(lines)) == parse_request(LONG)
    assert (len(lines) == 1) == (width >= len(LONG))


def test_a_table_gives_a_plan_the_room_that_is_left() -> None:
    screen = io.StringIO()
    table = Table(box=None, pad_edge=False)
    for name in ("plan", "step time"):
        table.add_column(name, no_wrap=name != "plan")
    table.add_row(PlanText(LONG), "17.3 s")
    table.add_row(PlanText("dp=8"), "18.0 s")
    Console(file=screen, width=64).print(table)
    _, first, second, third = (line.split() for line in screen.getvalue().splitlines())
    assert first == ["dp=128,pp=2,zero=3,mb=1,", "17.3", "s"]
    assert second == ["recompute=full:6+selective:13,cp=2,schedule=zb-v,v=2"]
    assert third == ["dp=8", "18.0", "s"]


@pytest.mark.parametrize(("is_terminal", "num_lines"), [(True, 3), (False, 1)])
def test_a_sentence_breaks_between_words_on_a_screen_only(is_terminal: bool, num_lines: int) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=is_terminal, color_system=None, width=40)
    words = "best of 805,779 plans: 484,016 too slow and 14,395 too large by their bounds, 307,360 by rule"
    say(console, words)
    lines = screen.getvalue().splitlines()
    assert len(lines) == num_lines
    assert " ".join(lines).split() == words.split()
