"""``best_rows``: list scheduling under many policies, first those that theory suggests, then neighbours of the best."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace

from shardstage.schedule.search.bound import margins_of
from shardstage.schedule.search.dispatch import Policy, dispatch
from shardstage.schedule.search.problem import Problem, Rows, trace

__all__ = ["best_rows"]

KEPT = 2
"""Different rows that are worth improving further."""


def best_rows(
    problem: Problem, bound_s: float, time_left: Callable[[], float], rng: random.Random
) -> list[Rows]:
    """The best rows, at most ``KEPT`` and of different makespans, best first; stops at the bound or when ``time_left()`` is 0."""
    best: list[tuple[float, Rows, Policy]] = []
    policies = _suggested(problem)
    while time_left() > 0 and not (best and best[0][0] <= bound_s * (1 + 1e-9)):
        policy = next(policies, None)
        if policy is None:
            if not best:
                break
            policy = _neighbour(problem, rng.choice(best)[2], rng)
        rows = dispatch(problem, policy)
        ran = None if rows is None else trace(problem, rows)
        if rows is not None and ran is not None and all(ran.makespan_s != entry[0] for entry in best):
            best = sorted([*best, (ran.makespan_s, rows, policy)], key=lambda entry: entry[0])[:KEPT]
    return [rows for _, rows, _ in best]


def _suggested(problem: Problem) -> Iterator[Policy]:
    """Caps in proportion to how long a microbatch is away: as many as set out in that time, at the pace of the slowest rank."""
    m = problem.num_microbatches
    margins = margins_of(problem)
    pace_s = max(
        sum(problem.took_s[token] for token in problem.tokens_of(rank)) for rank in range(problem.num_ranks)
    )
    away = []
    for stage in range(problem.num_stages):
        back = margins.heads_s[3 * stage + 1][0] + problem.took_s[3 * stage + 1]
        away.append((back - margins.heads_s[3 * stage][0]) / pace_s if pace_s else 1.0)
    several = problem.num_stages > problem.num_ranks
    choices = itertools.product(
        (True, False), (0.0, 0.5, 1.0), (False, True), (1.0, 2.0, 1.5, math.inf, 3.0, 0.7, 0.4)
    )
    for is_depth_first, patience_ratio, is_forward_first, times in choices:
        if is_depth_first or several:
            caps = tuple(m if times == math.inf else min(m, max(1, math.ceil(times * part))) for part in away)
            yield Policy(
                caps=caps,
                patience_ratio=patience_ratio,
                is_forward_first=is_forward_first,
                is_depth_first=is_depth_first,
            )


def _neighbour(problem: Problem, policy: Policy, rng: random.Random) -> Policy:
    if rng.random() < 0.2:
        return replace(policy, patience_ratio=rng.choice((0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)))
    caps = list(policy.caps)
    for stage in rng.sample(range(len(caps)), k=rng.randint(1, min(3, len(caps)))):
        caps[stage] = max(1, min(problem.num_microbatches, caps[stage] + rng.choice((-2, -1, 1, 2))))
    return replace(policy, caps=tuple(caps))
