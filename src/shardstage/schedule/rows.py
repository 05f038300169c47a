"""``number_row``: a rank's row from the words that its schedule repeats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
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
    owed: list[Action] = []
    for word in _words(phases):
        if word == "W*":
            row += [owed.pop(0)] if owed else []
            continue
        kind, place = word[0], word[1:]
        counter = "backward" + place if kind in "BI" else word
        stage, microbatch = stages[int(place)], taken[counter]
        taken[counter] += 1
        if microbatch >= num_microbatches:
            continue
        row.append(Action(stage, cast("ActionKind", kind), microbatch))
        if kind == "I":
            owed.append(Action(stage, "W", microbatch))
    return tuple(row)


def _words(phases: Iterable[Phase]) -> Iterator[str]:
    for repeats, words in phases:
        yield from words.split() * repeats  # none for a negative number
