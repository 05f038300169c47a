"""``Fact`` and ``Rows``: what a verb has to tell, apart from where it is told; a terminal prints them here, a page draws them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from shardstage.cli.wrapping import PlanText, say

__all__ = ["PLAN", "Fact", "Rows", "print_fact", "print_rows"]

PLAN: Final = "plan"
"""The head of a column of shorthands, which break after commas."""

NAME_WIDTH: Final = 11


@dataclass(frozen=True)
class Fact:
    """A sentence with its name; ``is_pasted`` where it holds what somebody may want to paste, which no line is to break."""

    name: str
    text: str
    is_pasted: bool = False


@dataclass(frozen=True)
class Rows:
    """A table of texts. Its first and last columns may be long, all others are figures."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def print_fact(console: Console, fact: Fact) -> None:
    line = f"{fact.name:<{NAME_WIDTH}}{escape(fact.text)}"
    if fact.is_pasted:
        console.print(line, soft_wrap=True)
    else:
        say(console, line)


def print_rows(console: Console, told: Rows) -> None:
    """Nothing where there is no row."""
    if not told.rows:
        return
    table = Table(box=None, pad_edge=False, title=told.title, title_justify="left")
    first, *figures, last = told.heads
    table.add_column(first, overflow="fold")
    for head in figures:
        table.add_column(head, no_wrap=True)
    table.add_column(last)
    for row in told.rows:
        table.add_row(PlanText(row[0]) if first == PLAN else escape(row[0]), *map(escape, row[1:]))
    console.print(table)
