"""``Problem``: stages, times and limits as tables by token, and what a set of rows comes to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from shardstage.schedule.action import Action, Schedule
from shardstage.schedule.timing import StageBytes, StageTimes

__all__ = ["Problem", "Rows", "Trace", "make_problem", "rows_of", "schedule_of", "trace"]

Rows = list[list[int]]
"""A row of tokens for each rank; token ``3 s`` is F of stage s, ``3 s + 1`` I (or B, where backwards are whole) and ``3 s + 2`` W."""

NONE = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Tables by token: seconds, the token needed (or -1) and the seconds it takes to arrive, bytes taken before and given back after.

    ``is_split`` says that backwards are I and W; else they are whole and no row has a W. ``limits_bytes`` are by rank; none is infinite.
    """

    num_microbatches: int
    stage_ranks: tuple[int, ...]
    is_split: bool
    took_s: tuple[float, ...]
    needed: tuple[int, ...]
    lag_s: tuple[float, ...]
    taken_bytes: tuple[int, ...]
    freed_bytes: tuple[int, ...]
    limit_bytes: float

    @property
    def num_ranks(self) -> int:
        return max(self.stage_ranks) + 1

    @property
    def num_stages(self) -> int:
        return len(self.stage_ranks)

    @property
    def kinds(self) -> tuple[int, ...]:
        """0 for F, 1 for I or B, and where backwards are split 2 for W."""
        return (0, 1, 2) if self.is_split else (0, 1)

    def tokens_of(self, rank: int) -> tuple[int, ...]:
        return tuple(
            3 * stage + kind
            for stage, holder in enumerate(self.stage_ranks)
            if holder == rank
            for kind in self.kinds
        )

    def fits(self, row: Sequence[int]) -> bool:
        """Whether a rank that runs the row stays within the limit."""
        held = 0
        for token in row:
            held += self.taken_bytes[token]
            if held > self.limit_bytes:
                return False
            held -= self.freed_bytes[token]
            if held > self.limit_bytes:
                return False
        return True


class Trace(NamedTuple):
    """Rows that ran: ``starts_s`` and ``ends_s`` by rank and place, and the end of the last action."""

    starts_s: list[list[float]]
    ends_s: list[list[float]]
    makespan_s: float


def make_problem(
    times: Sequence[StageTimes],
    memory: Sequence[StageBytes],
    num_microbatches: int,
    stage_ranks: tuple[int, ...],
    limit_bytes: float,
    *,
    is_split: bool,
) -> Problem:
    """Tables for stages on these ranks; ``memory`` may be empty."""
    last = len(times) - 1
    took: list[float] = []
    needed: list[int] = []
    lags: list[float] = []
    taken: list[int] = []
    freed: list[int] = []
    apart = [s > 0 and stage_ranks[s] != stage_ranks[s - 1] for s in range(len(times))]
    for s, time in enumerate(times):
        part = memory[s] if memory else StageBytes(held_bytes=0)
        by_input = part.freed_by_input_bytes if is_split else part.held_bytes
        took += [time.forward_s, time.input_s if is_split else time.whole_backward_s, time.weight_s]
        needed += [3 * (s - 1) if s else NONE, 3 * s if s == last else 3 * (s + 1) + 1, 3 * s + 1]
        returned = 0.0 if s == last or not apart[s + 1] else times[s + 1].receive_s
        lags += [time.receive_s if apart[s] else 0.0, returned, 0.0]
        taken += [part.held_bytes, 0, 0]
        freed += [0, by_input, part.held_bytes - by_input]
    return Problem(
        num_microbatches=num_microbatches,
        stage_ranks=stage_ranks,
        is_split=is_split,
        took_s=tuple(took),
        needed=tuple(needed),
        lag_s=tuple(lags),
        taken_bytes=tuple(taken),
        freed_bytes=tuple(freed),
        limit_bytes=limit_bytes,
    )


def trace(problem: Problem, rows: Rows) -> Trace | None:
    """Runs the rows, each action as soon as it can; ``None`` if they cannot run to their end."""
    m = problem.num_microbatches
    took, needed, lag = problem.took_s, problem.needed, problem.lag_s
    made: list[float] = [-1.0] * (3 * m * problem.num_stages)
    waiter = [NONE] * len(made)
    count = [0] * (3 * problem.num_stages)
    starts: list[list[float]] = [[] for _ in rows]
    ends: list[list[float]] = [[] for _ in rows]
    ready = list(range(len(rows)))
    left = sum(map(len, rows))
    while ready:
        rank = ready.pop()
        row, began, ended = rows[rank], starts[rank], ends[rank]
        first = len(ended)
        now = ended[-1] if first else 0.0
        for token in row[first:] if first else row:
            number = count[token]
            before = needed[token]
            if before >= 0:
                slot = before * m + number
                arrival = made[slot]
                if arrival < 0:
                    waiter[slot] = rank
                    break
                arrival += lag[token]
                if arrival > now:
                    now = arrival
            began.append(now)
            now += took[token]
            ended.append(now)
            count[token] = number + 1
            slot = token * m + number
            made[slot] = now
            if waiter[slot] >= 0:
                ready.append(waiter[slot])
                waiter[slot] = NONE
        left -= len(ended) - first
    return None if left else Trace(starts, ends, max(row[-1] for row in ends))


def rows_of(problem: Problem, schedule: Schedule) -> Rows:
    """The schedule's rows in tokens, with its backwards split or whole as the problem wants them."""
    tokens: dict[str, tuple[int, ...]] = {"F": (0,), "B": (1, 2), "I": (1,), "W": (2,)}
    return [
        [3 * action.stage + kind for action in row for kind in tokens[action.kind] if kind in problem.kinds]
        for row in schedule.actions
    ]


def schedule_of(problem: Problem, rows: Rows, name: str) -> Schedule:
    """The rows as a schedule: each token of a stage takes the microbatches in turn."""
    kinds: tuple[str, ...] = ("F", "I", "W") if problem.is_split else ("F", "B")
    count = [0] * (3 * problem.num_stages)
    actions: list[tuple[Action, ...]] = []
    for tokens in rows:
        row: list[Action] = []
        for token in tokens:
            row.append(Action.parse(f"{token // 3}{kinds[token % 3]}{count[token]}"))
            count[token] += 1
        actions.append(tuple(row))
    return Schedule(
        name=name,
        num_microbatches=problem.num_microbatches,
        stage_ranks=problem.stage_ranks,
        actions=tuple(actions),
    )
