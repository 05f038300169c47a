"""``least_makespan_s``: what no schedule of a problem can beat.

The largest, over the ranks, of two bounds:

    one machine   the rank alone, every other as fast as its own actions allow. Action k of a token has a head, the least seconds before
                  it, and a tail, the least seconds after it; the preemptive schedule that always runs what has the largest tail is the
                  best there is (Jackson 1955; Carlier, "The one-machine sequencing problem", 1982)
    memory        bytes × seconds: activations stay on the rank from the start of F to the end of I, and what W needs until its end;
                  under a limit of L bytes the rank therefore needs at least (the sum of these areas) / L seconds
"""

from __future__ import annotations

import heapq
import math
from typing import NamedTuple

from shardstage.schedule.search.problem import Problem

__all__ = ["Margins", "least_makespan_s", "margins_of"]


class Margins(NamedTuple):
    """Least seconds before (``heads_s``) and after (``tails_s``) action k of a token, by token and k."""

    heads_s: list[list[float]]
    tails_s: list[list[float]]


def least_makespan_s(problem: Problem) -> float:
    """A lower bound on the makespan of any schedule, in seconds."""
    margins = margins_of(problem)
    return max(
        max(_one_machine_s(problem, margins, rank), _memory_s(problem, margins, rank))
        for rank in range(problem.num_ranks)
    )


def margins_of(problem: Problem) -> Margins:
    """By longest paths, where only actions of the same token wait for each other and for what they need."""
    m, count = problem.num_microbatches, 3 * problem.num_stages
    heads = [[0.0] * m for _ in range(count)]
    tails = [[0.0] * m for _ in range(count)]
    order = _order(problem)
    for token in order:
        took, before = problem.took_s[token], problem.needed[token]
        arrival = problem.lag_s[token] + (problem.took_s[before] if before >= 0 else 0.0)
        for k in range(m):
            least = heads[token][k - 1] + took if k else 0.0
            heads[token][k] = max(least, heads[before][k] + arrival) if before >= 0 else least
    for token in reversed(order):
        took, before = problem.took_s[token], problem.needed[token]
        for k in reversed(range(m)):
            if k + 1 < m:
                tails[token][k] = max(tails[token][k], tails[token][k + 1] + took)
            if before >= 0:
                after = problem.lag_s[token] + took + tails[token][k]
                tails[before][k] = max(tails[before][k], after)
    return Margins(heads, tails)


def _order(problem: Problem) -> list[int]:
    """Tokens, each behind what it needs."""
    stages = range(problem.num_stages)
    return [
        *(3 * s for s in stages),
        *(3 * s + kind for s in reversed(stages) for kind in problem.kinds[1:]),
    ]


def _one_machine_s(problem: Problem, margins: Margins, rank: int) -> float:
    jobs = sorted(
        (margins.heads_s[token][k], -margins.tails_s[token][k], problem.took_s[token])
        for token in problem.tokens_of(rank)
        for k in range(problem.num_microbatches)
    )
    waiting: list[tuple[float, float]] = []
    now, at, bound = 0.0, 0, 0.0
    while at < len(jobs) or waiting:
        if not waiting:
            now = max(now, jobs[at][0])
        while at < len(jobs) and jobs[at][0] <= now:
            heapq.heappush(waiting, jobs[at][1:])
            at += 1
        less_tail, left = heapq.heappop(waiting)
        upto = jobs[at][0] if at < len(jobs) else math.inf
        if now + left > upto:
            heapq.heappush(waiting, (less_tail, left - (upto - now)))
            now = upto
        else:
            now += left
            bound = max(bound, now - less_tail)
    return bound


def _memory_s(problem: Problem, margins: Margins, rank: int) -> float:
    """0 without a limit, or where nothing is held."""
    if problem.limit_bytes == math.inf or not problem.limit_bytes:
        return 0.0
    took, freed = problem.took_s, problem.freed_bytes
    area = 0.0
    tokens = problem.tokens_of(rank)
    for stage in sorted({token // 3 for token in tokens}):
        forward, backward, weight = 3 * stage, 3 * stage + 1, 3 * stage + 2
        # The way from this F to this I is the same for every microbatch.
        stay_s = margins.heads_s[backward][0] + took[backward] - margins.heads_s[forward][0]
        held = problem.taken_bytes[forward]
        area += held * stay_s + (held - freed[backward]) * (took[weight] if problem.is_split else 0.0)
    head_s = min(margins.heads_s[token][0] for token in tokens)
    tail_s = min(margins.tails_s[token][-1] for token in tokens)
    return head_s + problem.num_microbatches * area / problem.limit_bytes + tail_s
