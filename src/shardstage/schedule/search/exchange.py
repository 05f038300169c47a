"""``improve``: local search. On the path that sets the makespan, actions of a rank change places.

The makespan is the length of a path of actions without a gap between them, each held up by the one before it on its rank or by the one
that it needs. Only a change of order on that path can shorten it (Grabowski et al., 1986): of each run of actions that the path has
on one rank, neighbours are swapped, one is brought to the front, or one (a W, say) is put off behind it.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from shardstage.schedule.search.problem import Problem, Rows, Trace, trace

__all__ = ["improve"]

STRAY_RATIO = 0.02
"""How much longer than the best the rows may become on the way to better ones, at first; it shrinks to nothing. Our choice."""


def improve(
    problem: Problem, rows: Rows, bound_s: float, time_left: Callable[[], float], rng: random.Random
) -> tuple[Rows, float]:
    """The best rows found until ``time_left()``, which goes from 1 to 0, is over, or they meet the bound; and their makespan.

    Rows may become worse on the way by a share that shrinks with the time left (record-to-record travel, Dueck 1993).
    """
    current = trace(problem, rows)
    assert current is not None, "local search starts from rows that run"
    best_rows, best_s = rows, current.makespan_s
    left = time_left()
    while left > 0 and best_s > bound_s * (1 + 1e-9):
        move = _random_move(problem, rows, current, rng)
        if move is None:
            break
        rank, row = move
        changed = [*rows[:rank], row, *rows[rank + 1 :]]
        tried = trace(problem, changed) if _is_ordered(problem, row) and problem.fits(row) else None
        if tried is not None and tried.makespan_s <= best_s * (1 + STRAY_RATIO * left):
            rows, current = changed, tried
            if current.makespan_s < best_s:
                best_rows, best_s = rows, current.makespan_s
        left = time_left()
    return best_rows, best_s


def _random_move(
    problem: Problem, rows: Rows, current: Trace, rng: random.Random
) -> tuple[int, list[int]] | None:
    """A rank and its changed row; ``None`` if the path leaves nothing to change."""
    runs = [
        (rank, first, last) for rank, first, last in _critical_runs(problem, rows, current) if last > first
    ]
    if not runs:
        return None
    rank, first, last = rng.choice(runs)
    row = list(rows[rank])
    source = rng.randint(first, last)
    target = rng.choice(
        (source - 1, source + 1, first, last, rng.randint(first, min(last + 4, len(row) - 1)))
    )
    row.insert(max(first, min(target, len(row) - 1)), row.pop(source))
    return rank, row


def _critical_runs(problem: Problem, rows: Rows, current: Trace) -> list[tuple[int, int, int]]:
    """(rank, first place, last place) of each run of a longest path, from its end back."""
    where = _places(problem, rows)
    number = [0] * (3 * problem.num_stages)
    numbers = []
    for row in rows:
        of_row = []
        for token in row:
            of_row.append(number[token])
            number[token] += 1
        numbers.append(of_row)
    rank = max(range(len(rows)), key=lambda r: current.ends_s[r][-1])
    last = place = len(rows[rank]) - 1
    runs = []
    while True:
        start = current.starts_s[rank][place]
        if place and current.ends_s[rank][place - 1] >= start:
            place -= 1
            continue
        runs.append((rank, place, last))
        token = rows[rank][place]
        before = problem.needed[token]
        if before < 0 or start <= 0:
            return runs
        k = numbers[rank][place]
        rank = problem.stage_ranks[before // 3]
        last = place = where[before][k]


def _places(problem: Problem, rows: Rows) -> list[list[int]]:
    """Place in its row of action k of each token."""
    where: list[list[int]] = [[] for _ in range(3 * problem.num_stages)]
    for row in rows:
        for place, token in enumerate(row):
            where[token].append(place)
    return where


def _is_ordered(problem: Problem, row: list[int]) -> bool:
    """Whether no I comes before its F and no W before its I."""
    count: dict[int, int] = dict.fromkeys(row, 0)
    for token in row:
        count[token] += 1
        if token % 3 and count[token] > count[token - 1]:
            return False
    return True
