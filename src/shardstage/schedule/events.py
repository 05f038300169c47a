"""``walk``: the event recurrence that times, checks and draws a schedule, and that the search runs thousands of times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from shardstage.schedule.action import Action, Schedule

__all__ = ["Step", "Walk", "needs", "slot_of", "walk"]

Step = tuple[int, int, float, float]
"""(slot of the action's result, slot of what it needs or -1, seconds that this takes to arrive, seconds of the action)."""


class Walk(NamedTuple):
    """Starts and ends of the actions of each row that could run, in order; where a row is shorter than its steps, it is stuck."""

    starts_s: list[list[float]]
    ends_s: list[list[float]]


def slot_of(schedule: Schedule, action: Action) -> int:
    """Number of what an action makes: F the output, B and I the gradient of the input, W that of the weights."""
    part = {"F": 0, "B": 1, "I": 1, "W": 2}[action.kind]
    return (part * schedule.num_stages + action.stage) * schedule.num_microbatches + action.microbatch


def needs(schedule: Schedule, action: Action) -> Action | None:
    """The action whose result this one waits for. A backward needs that of the stage behind, I standing for B too."""
    stage, kind, microbatch = action.stage, action.kind, action.microbatch
    if kind == "W":
        return Action(stage, "I", microbatch)
    if kind == "F":
        return Action(stage - 1, "F", microbatch) if stage else None
    if stage == schedule.num_stages - 1:
        return Action(stage, "F", microbatch)
    return Action(stage + 1, "I", microbatch)


def walk(rows: Sequence[Sequence[Step]], num_slots: int) -> Walk:
    """Runs the rows, one action of a row after the other, as far as they go; each slot is needed by at most one row that waits.

    A row that meets what is not there yet leaves its number in that slot and is taken up again by who fills it: each step is looked at
    once, or twice.
    """
    made = [-1.0] * num_slots
    waiter = [-1] * num_slots
    starts: list[list[float]] = [[] for _ in rows]
    ends: list[list[float]] = [[] for _ in rows]
    ready = list(range(len(rows)))
    while ready:
        number = ready.pop()
        row, began, ended = rows[number], starts[number], ends[number]
        now = ended[-1] if ended else 0.0
        for at in range(len(ended), len(row)):
            slot, before, lag_s, took_s = row[at]
            if before >= 0:
                arrival = made[before]
                if arrival < 0:
                    waiter[before] = number
                    break
                arrival += lag_s
                if arrival > now:
                    now = arrival
            began.append(now)
            now += took_s
            ended.append(now)
            made[slot] = now
            if waiter[slot] >= 0:
                ready.append(waiter[slot])
                waiter[slot] = -1
    return Walk(starts, ends)
