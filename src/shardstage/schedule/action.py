"""``Action`` and ``Schedule``: what each stage does, one thing after the other."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from shardstage.errors import ProgramError

__all__ = ["Action", "Schedule"]

Kind = Literal["F", "B"]
_ACTION = re.compile(r"(?P<stage>\d+)(?P<kind>[FB])(?P<microbatch>\d+)")


@dataclass(frozen=True, slots=True)
class Action:
    """One computation of one stage on one microbatch; as text ``{stage}{kind}{microbatch}``: ``1F0``."""

    stage: int
    kind: Kind
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"

    @staticmethod
    def parse(text: str) -> Action:
        match = _ACTION.fullmatch(text)
        if match is None:
            raise ProgramError(
                f"{text!r} is not an action", hint="0F0 (stage 0 runs the forward of microbatch 0)"
            )
        kind: Kind = "F" if match["kind"] == "F" else "B"
        return Action(int(match["stage"]), kind, int(match["microbatch"]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """``actions[s]`` is the order in which the rank of stage s acts."""

    name: str
    num_stages: int
    num_microbatches: int
    actions: tuple[tuple[Action, ...], ...]

    def __str__(self) -> str:
        return "\n".join(" ".join(map(str, row)) for row in self.actions)

    def max_in_flight(self, stage: int) -> int:
        """Most microbatches whose forward is done and whose backward is not, on ``stage``: how many times its activations are held."""
        held = most = 0
        for action in self.actions[stage]:
            held += 1 if action.kind == "F" else -1
            most = max(most, held)
        return most
