"""``number_row``: a rank's row from the words that its schedule repeats."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from typing import cast

from shardstage.schedule.action import Action, ActionKind

__all__ = ["Phase", "number_row"]

Phase = tuple[int, str]
"""How often words are repeated: ``(3, "F0 B1")``. A word is a kind and which of the rank's stages acts."""


def number_row(stages: tuple[int, ...], num_microbatches: int, phases: Iterable[Phase]) -> tuple[Action, ...]:
    """The phases' words in order; forwards, backwards and Ws of a stage each take the microbatches one after the other.

    ``stages`` are the rank's. A word for which no microbatch is left is passed over, so a phase may repeat too often, and the row for
    few microbatches is the one for many without those that are missing. ``W*`` is the W of the rank's oldest I that waits for one.
    """
    row: list[Action] = []
    taken: Counter[str] = Counter()
    owed: deque[Action] = deque()
    for repeats, words in phases:
        group = [_meaning(word, stages) for word in words.split()]
        for _ in range(repeats):  # never, for a negative number
            for kind, stage, counter in group:
                if counter == "*":
                    row += [owed.popleft()] if owed else []
                    continue
                microbatch = taken[counter]
                taken[counter] = microbatch + 1
                if microbatch < num_microbatches:
                    row.append(Action(stage, kind, microbatch))
                    if kind == "I":
                        owed.append(Action(stage, "W", microbatch))
    return tuple(row)


def _meaning(word: str, stages: tuple[int, ...]) -> tuple[ActionKind, int, str]:
    """Kind, stage and what counts its microbatches: B and I together."""
    if word == "W*":
        return "W", -1, "*"
    kind, place = cast("ActionKind", word[0]), word[1:]
    return kind, stages[int(place)], ("B" if kind == "I" else kind) + place
