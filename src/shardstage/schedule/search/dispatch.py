"""``dispatch``: list scheduling. Time goes on, and a rank that is free takes the best action that it has."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

from shardstage.schedule.search.problem import Problem, Rows

__all__ = ["Policy", "dispatch"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """What a rank prefers.

    ``caps[s]`` is how many microbatches stage s may be ahead with F of I. ``patience_ratio`` is how long, in parts of the action that it
    would run instead, a rank waits for a better one that is on its way. Backwards come before forwards unless
    ``is_forward_first``, and W comes when there is nothing else. Of several stages' forwards (backwards), the last (first) stage's goes
    first if ``is_depth_first``, else the one with the fewest microbatches done.
    """

    caps: tuple[int, ...]
    patience_ratio: float = 0.5
    is_forward_first: bool = False
    is_depth_first: bool = True


def dispatch(problem: Problem, policy: Policy) -> Rows | None:
    """The rows of a policy; ``None`` if the memory limit brings it to a halt."""
    run = _Run(problem, policy)
    while run.queue:
        when, rank = heapq.heappop(run.queue)
        if when != run.due_s[rank]:
            continue
        run.due_s[rank] = math.inf
        chosen = run.choose(rank)
        if chosen is None:
            continue
        start, token = chosen
        if start > when:
            run.wake(rank, start)
        else:
            run.start(rank, token, start)
    wanted = len(problem.kinds) * problem.num_microbatches * problem.num_stages
    return run.rows if sum(map(len, run.rows)) == wanted else None


class _Run:
    """One pass through time. ``due_s[rank]`` is when it is worth asking the rank again; ``queue`` holds these times, and some that have
    since been brought forward."""

    def __init__(self, problem: Problem, policy: Policy) -> None:
        self.problem = problem
        self.policy = policy
        ranks = range(problem.num_ranks)
        self.stages = [[s for s, holder in enumerate(problem.stage_ranks) if holder == r] for r in ranks]
        self.rows: Rows = [[] for _ in ranks]
        self.free_s = [0.0 for _ in ranks]
        self.held_bytes = [0 for _ in ranks]
        self.count = [0] * (3 * problem.num_stages)
        self.arrivals: list[list[float]] = [[] for _ in self.count]
        self.arrivals[0] = [0.0] * problem.num_microbatches
        self.followers: list[list[int]] = [[] for _ in self.count]
        for token, before in enumerate(problem.needed):
            if before >= 0:
                self.followers[before].append(token)
        self.due_s = [0.0 for _ in ranks]
        self.queue: list[tuple[float, int]] = [(0.0, rank) for rank in ranks]

    def choose(self, rank: int) -> tuple[float, int] | None:
        """(start, token) of the action that the rank would take next, as far as it knows."""
        free, took = self.free_s[rank], self.problem.took_s
        found: list[tuple[tuple[int, int], float, int]] = []
        for stage in self.stages[rank]:
            for kind in (0, 1):
                token = 3 * stage + kind
                number = self.count[token]
                if number < len(self.arrivals[token]) and self._may(rank, stage, kind):
                    start = max(free, self.arrivals[token][number])
                    found.append((self._preference(stage, kind), start, token))
        weight = self._weight(rank)
        if weight is not None:
            found.append(((9, 0), free, weight))
        if not found:
            return None
        soonest = min((start, preference, token) for preference, start, token in found)[::2]
        upto = soonest[0] + self.policy.patience_ratio * took[soonest[1]]
        _, start, token = min(entry for entry in found if entry[1] <= upto)
        return start, token

    def start(self, rank: int, token: int, start: float) -> None:
        """Runs the action and tells who waited for it."""
        problem = self.problem
        end = start + problem.took_s[token]
        self.rows[rank].append(token)
        self.free_s[rank] = end
        self.count[token] += 1
        self.held_bytes[rank] += problem.taken_bytes[token] - problem.freed_bytes[token]
        for follower in self.followers[token]:
            arrival = end + problem.lag_s[follower]
            self.arrivals[follower].append(arrival)
            holder = problem.stage_ranks[follower // 3]
            if holder != rank:
                self.wake(holder, max(start, self.free_s[holder]))
        self.wake(rank, end)

    def wake(self, rank: int, when: float) -> None:
        """Asks the rank at this time, unless it is asked before."""
        if when < self.due_s[rank]:
            self.due_s[rank] = when
            heapq.heappush(self.queue, (when, rank))

    def _may(self, rank: int, stage: int, kind: int) -> bool:
        problem, token = self.problem, 3 * stage + kind
        held = self.held_bytes[rank] + problem.taken_bytes[token]
        if max(held, held - problem.freed_bytes[token]) > problem.limit_bytes:
            return False
        return kind == 1 or self.count[token] - self.count[token + 1] < self.policy.caps[stage]

    def _preference(self, stage: int, kind: int) -> tuple[int, int]:
        """Less is better."""
        among_kinds = kind if self.policy.is_forward_first else 1 - kind
        if not self.policy.is_depth_first:
            return among_kinds, self.count[3 * stage + kind]
        return among_kinds, stage if kind else -stage

    def _weight(self, rank: int) -> int | None:
        """The W that has waited for longest, by its stage's count."""
        owed = [
            3 * stage + 2
            for stage in self.stages[rank]
            if self.problem.is_split and self.count[3 * stage + 2] < self.count[3 * stage + 1]
        ]
        return min(owed, key=self.count.__getitem__, default=None)
