"""``solve_exactly``: small problems as a mixed-integer program, by HiGHS.

Variables    t_a    start of action a                              head_a <= t_a <= C* - took_a - tail_a
             y_ab   1 if a runs before b, for a, b on one rank whose order is open
             C      the makespan, to be least
Constraints  t_b >= t_a + took_a + lag_b                           b needs a, or follows a of the same token
             t_b >= t_a + took_a - M (1 - y_ab)                    and the same with a, b exchanged and 1 - y_ab
             y_ab <= y_ab', y_a'b <= y_ab                          a' follows a, b' follows b
             C >= t_a + took_a + tail_a
             sum of taken bytes - sum of freed bytes <= limit      before each action that takes bytes, by what has run before it

C* is what is to be beaten: where a before b would make the schedule longer than that, y_ab is not open. M is the least that lets the
constraint vanish (Manne 1960; bounds from heads and tails).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from shardstage.schedule.search.bound import Margins, margins_of, releases
from shardstage.schedule.search.problem import Problem, Rows
from shardstage.schedule.search.stdout import stdout_to_stderr

__all__ = ["Answer", "solve_exactly"]

MOST_OPEN = 700
"""Open orders above which HiGHS does not end within minutes (found by trial)."""

PRECISION_RATIO = 1e-5
"""Only schedules shorter by this share are looked for: HiGHS keeps its constraints to 1e-6 or so."""

Op = tuple[int, int]
"""A token and which of its actions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """``rows`` that are shorter, if any; and what no rows can be shorter than, in seconds."""

    rows: Rows | None
    bound_s: float


def solve_exactly(problem: Problem, to_beat_s: float, bound_s: float, max_seconds: float) -> Answer | None:
    """Rows shorter than ``to_beat_s`` or a proof that there are none; ``None`` if the problem is too large to try."""
    model = _Model(problem, to_beat_s * (1 - PRECISION_RATIO))
    if not model.is_consistent:
        return Answer(rows=None, bound_s=max(bound_s, model.limit_s))
    if len(model.open) > MOST_OPEN:
        return None
    return model.solve(bound_s, max_seconds)


class _Model:
    """The constraints as triplets. Columns: the actions, then the open orders, then C."""

    def __init__(self, problem: Problem, limit_s: float) -> None:
        self.problem = problem
        self.limit_s = limit_s
        self.margins: Margins = margins_of(problem)
        tokens = sorted(token for rank in range(problem.num_ranks) for token in problem.tokens_of(rank))
        self.ops: list[Op] = [(token, k) for token in tokens for k in range(problem.num_microbatches)]
        self.column = {op: number for number, op in enumerate(self.ops)}
        self.open: dict[tuple[Op, Op], int] = {}
        self.fixed: dict[tuple[Op, Op], bool] = {}
        self.releases = {(wait.forward, wait.before): wait.counts for wait in releases(problem)}
        self.is_consistent = True
        for rank in range(problem.num_ranks):
            for a, b in itertools.combinations(problem.tokens_of(rank), 2):
                self._order(a, b)
        self.entries: list[tuple[int, int, float]] = []
        self.floors: list[float] = []

    def solve(self, bound_s: float, max_seconds: float) -> Answer | None:
        """Runs HiGHS; seconds are scaled so that the makespan to beat is 1000."""
        import numpy
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import coo_array

        scale = 1000 / self.limit_s
        self._constrain(scale)
        num_ops, num_open = len(self.ops), len(self.open)
        least = [self._head(op) * scale for op in self.ops] + [0.0] * num_open + [bound_s * scale]
        most = [(self.limit_s - self._took(op) - self._tail(op)) * scale for op in self.ops]
        most = [max(high, low) for high, low in zip(most, least, strict=False)] + [1.0] * num_open + [1000.0]
        numbers, columns, values = zip(*self.entries, strict=True)
        shape = (len(self.floors), num_ops + num_open + 1)
        matrix = coo_array((values, (numbers, columns)), shape=shape).tocsr()
        with stdout_to_stderr():
            found = milp(
                numpy.array([0.0] * (num_ops + num_open) + [1.0]),
                integrality=numpy.array([0] * num_ops + [1] * num_open + [0]),
                bounds=Bounds(numpy.array(least), numpy.array(most)),
                constraints=LinearConstraint(matrix, lb=numpy.array(self.floors)),
                options={"time_limit": max_seconds, "mip_rel_gap": PRECISION_RATIO / 10},
            )
        if found.status == 2:
            return Answer(rows=None, bound_s=max(bound_s, self.limit_s))
        dual = getattr(found, "mip_dual_bound", None)
        proved_s = bound_s if dual is None else max(bound_s, min(dual / scale * (1 - 1e-6), self.limit_s))
        return Answer(rows=None if found.x is None else self._rows(list(found.x)), bound_s=proved_s)

    def _order(self, a: int, b: int) -> None:
        """Which of the actions of two tokens of a rank have an order, and which have not yet."""
        reaches = (self._reaches(a, b), self._reaches(b, a))
        counts = self.releases.get((a, b), [0] * self.problem.num_microbatches)
        for i, j in itertools.product(range(self.problem.num_microbatches), repeat=2):
            first, second = (a, i), (b, j)
            together = self._took(first) + self._took(second)
            late = self._head(first) + together + self._tail(second) > self.limit_s
            early = self._head(second) + together + self._tail(first) > self.limit_s
            a_first = (reaches[0] and i <= j) or early
            b_first = (reaches[1] and j <= i) or late or j < counts[i]
            if a_first and b_first:
                self.is_consistent = False
            if a_first or b_first:
                self.fixed[first, second] = a_first
            else:
                self.open[first, second] = len(self.ops) + len(self.open)

    def _reaches(self, a: int, b: int) -> bool:
        """Whether action k of token b needs, through others, action k of token a."""
        if a % 3 == 2:
            return False
        last = 2 * self.problem.num_stages - 1

        def position(token: int) -> int:
            return token // 3 if token % 3 == 0 else last - token // 3

        return position(a) < position(b) or (b % 3 == 2 and position(a) == position(b))

    def _constrain(self, scale: float) -> None:
        problem, end = self.problem, len(self.ops) + len(self.open)
        for (token, k), at in self.column.items():
            took = self._took((token, k))
            before = problem.needed[token]
            if before >= 0:
                lag = (problem.took_s[before] + problem.lag_s[token]) * scale
                self._add({at: 1.0, self.column[before, k]: -1.0}, lag)
            if k:
                self._add({at: 1.0, self.column[token, k - 1]: -1.0}, took * scale)
            self._add({end: 1.0, at: -1.0}, (took + self._tail((token, k))) * scale)
        for (a, b), is_first in self.fixed.items():
            first, second = (a, b) if is_first else (b, a)
            self._add({self.column[second]: 1.0, self.column[first]: -1.0}, self._took(first) * scale)
        for (a, b), y in self.open.items():
            for first, second, sign in ((a, b, 1.0), (b, a, -1.0)):
                took = self._took(first)
                slack = (self.limit_s - self._tail(first) - self._head(second)) * scale
                # t_second - t_first - slack y >= took - slack, with y or 1 - y.
                floor = took * scale - (slack if sign > 0 else 0.0)
                self._add({self.column[second]: 1.0, self.column[first]: -1.0, y: -sign * slack}, floor)
            for later, is_less in ((((a[0], a[1] + 1), b), True), ((a, (b[0], b[1] + 1)), False)):
                other = self.open.get(later)
                if other is not None:
                    self._add({y: 1.0, other: -1.0} if is_less else {other: 1.0, y: -1.0}, 0.0)
        if problem.limit_bytes < float("inf"):
            self._constrain_memory()

    def _constrain_memory(self) -> None:
        """Before each action that takes bytes, or that keeps more than it frees, what the actions before it have left behind."""
        problem = self.problem
        for rank in range(problem.num_ranks):
            tokens = problem.tokens_of(rank)
            for op in ((token, k) for token in tokens for k in range(problem.num_microbatches)):
                token = op[0]
                takes = problem.taken_bytes[token] - min(0, problem.freed_bytes[token])
                if takes > 0:
                    row, held = self._held(op, tokens)
                    size = max(1.0, problem.limit_bytes)
                    self._add(
                        {y: -value / size for y, value in row.items()},
                        (held + takes - problem.limit_bytes) / size,
                    )

    def _held(self, op: Op, tokens: tuple[int, ...]) -> tuple[dict[int, float], float]:
        """Bytes that a rank holds when an action starts: coefficients of the open orders, and what is certain."""
        row: dict[int, float] = {}
        certain = 0.0
        for other in ((token, k) for token in tokens for k in range(self.problem.num_microbatches)):
            left = self.problem.taken_bytes[other[0]] - self.problem.freed_bytes[other[0]]
            if other[0] == op[0]:
                certain += left if other[1] < op[1] else 0.0
                continue
            pair, is_given = ((other, op), True) if other[0] < op[0] else ((op, other), False)
            if pair in self.fixed:
                certain += left if self.fixed[pair] == is_given else 0.0
            elif is_given:
                row[self.open[pair]] = left
            else:
                certain += left
                row[self.open[pair]] = -left
        return row, certain

    def _rows(self, values: list[float]) -> Rows:
        """Actions in the order of their starts; of those that start at once, what others need comes first."""
        last = 2 * self.problem.num_stages

        def rank_order(op: Op) -> tuple[float, int]:
            token = op[0]
            return (
                round(values[self.column[op]], 4),
                (token // 3, last - token // 3, 2 * last)[token % 3],
            )

        return [
            [
                token
                for token, _ in sorted(
                    (
                        (token, k)
                        for token in self.problem.tokens_of(rank)
                        for k in range(self.problem.num_microbatches)
                    ),
                    key=rank_order,
                )
            ]
            for rank in range(self.problem.num_ranks)
        ]

    def _add(self, coefficients: dict[int, float], floor: float) -> None:
        self.entries += [(len(self.floors), column, value) for column, value in coefficients.items()]
        self.floors.append(floor)

    def _took(self, op: Op) -> float:
        return self.problem.took_s[op[0]]

    def _head(self, op: Op) -> float:
        return self.margins.heads_s[op[0]][op[1]]

    def _tail(self, op: Op) -> float:
        return self.margins.tails_s[op[0]][op[1]]
