"""``Action`` and ``Schedule``: what each pipeline rank computes, one thing after the other."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

from shardstage.errors import ProgramError

__all__ = ["Action", "ActionKind", "Schedule"]

ActionKind = Literal["F", "B", "I", "W"]
_ACTION = re.compile(r"(?P<stage>\d+)(?P<kind>[FBIW])(?P<microbatch>\d+)")


class Action(NamedTuple):
    """One computation of one stage on one microbatch; as text ``{stage}{kind}{microbatch}``: ``1F0``.

    F is the forward, B the whole backward. Or the backward in two: I computes the gradient of the stage's input, which the stage
    before waits for, and W later that of its weights (Qi et al., "Zero Bubble Pipeline Parallelism", 2023; torch writes them so too).
    """

    stage: int
    kind: ActionKind
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
        return Action(int(match["stage"]), cast("ActionKind", match["kind"]), int(match["microbatch"]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """``actions[r]`` is the order in which pipeline rank r acts; ``stage_ranks[s]`` is the rank that runs stage s.

    A rank runs one stage, or several (interleaved, looped and V-shaped schedules).
    """

    name: str
    num_microbatches: int
    stage_ranks: tuple[int, ...]
    actions: tuple[tuple[Action, ...], ...]

    def __str__(self) -> str:
        return "\n".join(" ".join(map(str, row)) for row in self.actions)

    @property
    def num_stages(self) -> int:
        return len(self.stage_ranks)

    @property
    def num_ranks(self) -> int:
        return len(self.actions)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that a rank runs, in order."""
        return tuple(stage for stage, holder in enumerate(self.stage_ranks) if holder == rank)

    def max_in_flight(self, rank: int) -> int:
        """Most pairs (stage, microbatch) on ``rank`` whose forward is done and whose backward, both halves of it, is not.

        So many times are activations of one of its stages held; without any backward, those of one at a time.
        """
        return self._most_held(self.actions[rank])

    def max_held(self, stage: int) -> int:
        """Most microbatches whose activations ``stage`` holds at a time."""
        row = self.actions[self.stage_ranks[stage]]
        return self._most_held([action for action in row if action.stage == stage])

    @staticmethod
    def _most_held(row: Sequence[Action]) -> int:
        halves: Counter[tuple[int, int]] = Counter()
        held = most = 0
        for action in row:
            key = (action.stage, action.microbatch)
            halves[key] += {"F": 0, "B": 2, "I": 1, "W": 1}[action.kind]
            held += (action.kind == "F") - (action.kind != "F" and halves[key] == 2)
            most = max(most, held)
        return most if halves.total() > most else min(most, 1)
