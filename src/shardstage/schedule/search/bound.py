"""``least_makespan_s``: what no schedule of a problem can beat.

The largest, over the ranks, of two bounds:

    one machine   the rank alone, every other as fast as its own actions allow. Action k of a token has a head, the least seconds before
                  it, and a tail, the least seconds after it; the preemptive schedule that always runs what has the largest tail is the
                  best there is (Jackson 1955; Carlier, "The one-machine sequencing problem", 1982)
    memory        an action that takes bytes comes after as many that free them as it needs, which lengthens heads and tails; and
                  bytes × seconds: activations stay on the rank from the start of F to the end of I, and what W needs until its end;
                  under a limit of L bytes the rank needs at least (the sum of these areas) / L seconds
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from typing import NamedTuple

from shardstage.schedule.search.problem import Problem

__all__ = ["Margins", "least_makespan_s", "margins_of", "releases"]


class Release(NamedTuple):
    """Under a memory limit F number k of a stage starts after ``counts[k]`` actions of the token ``before``, I or W of the stage."""

    forward: int
    before: int
    counts: list[int]


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
    """By longest paths, where actions wait for the one before them of the same token, for what they need, and for memory."""
    m, took = problem.num_microbatches, problem.took_s
    order = _order(problem)
    waits: list[list[Release]] = [[] for _ in took]
    for release in releases(problem):
        waits[release.forward].append(release)
    heads = [[0.0] * m for _ in took]
    tails = [[0.0] * m for _ in took]
    for k in range(m):
        for token in order:
            before = problem.needed[token]
            head = heads[token][k - 1] + took[token] if k else 0.0
            if before >= 0:
                head = max(head, heads[before][k] + took[before] + problem.lag_s[token])
            for wait in waits[token]:
                if wait.counts[k]:
                    head = max(head, heads[wait.before][wait.counts[k] - 1] + took[wait.before])
            heads[token][k] = head
    for k in reversed(range(m)):
        for token in reversed(order):
            before, after = problem.needed[token], took[token] + tails[token][k]
            if k:
                tails[token][k - 1] = max(tails[token][k - 1], after)
            if before >= 0:
                tails[before][k] = max(tails[before][k], problem.lag_s[token] + after)
            for wait in waits[token]:
                if wait.counts[k]:
                    number = wait.counts[k] - 1
                    tails[wait.before][number] = max(tails[wait.before][number], after)
    return Margins(heads, tails)


def releases(problem: Problem) -> Iterator[Release]:
    """What the limit L makes F number k of a stage wait for, as if the rank had that stage alone.

    With h bytes held, of which I frees f, before F number k: (k + 1) h - i f - w (h - f) <= L after i times I and w times W. As w <= i,
    that takes i >= k + 1 - L / h; as i <= k, it takes w >= ((k + 1) h - k f - L) / (h - f).
    """
    if problem.limit_bytes == math.inf:
        return
    numbers = range(problem.num_microbatches)
    for stage in range(problem.num_stages):
        forward, backward, weight = 3 * stage, 3 * stage + 1, 3 * stage + 2
        held = problem.taken_bytes[forward]
        freed = max(0, problem.freed_bytes[backward])
        if not 0 < held <= problem.limit_bytes:
            continue
        fitting = int(problem.limit_bytes // held)
        yield Release(forward, backward, [max(0, k + 1 - fitting) for k in numbers])
        if problem.is_split and freed < held:
            lacking = [(k + 1) * held - k * freed - problem.limit_bytes for k in numbers]
            yield Release(forward, weight, [max(0, math.ceil(b / (held - freed))) for b in lacking])


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
