"""What is wider than the terminal: sentences break between words, plans after commas."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.text import Text

__all__ = ["PlanText", "say"]


def say(console: Console, sentence: str) -> None:
    """Prints a sentence; in a file it stays one line, which can be searched."""
    console.print(sentence, soft_wrap=not console.is_terminal)


@dataclass(frozen=True)
class PlanText:
    """A shorthand in a table; where it needs several lines, they can be pasted together as they are."""

    shorthand: str

    def lines(self, width: int) -> Iterator[str]:
        """As many decisions a line as ``width`` columns have room for, at least one."""
        line = ""
        for decision in re.findall(r"[^,]+,?", self.shorthand):
            if line and len(line) + len(decision) > width:
                yield line
                line = ""
            line += decision
        yield line

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        yield Text("\n".join(self.lines(options.max_width)), overflow="fold")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        longest = max(len(decision) + 1 for decision in self.shorthand.split(","))
        return Measurement(min(longest, options.max_width), min(len(self.shorthand), options.max_width))
