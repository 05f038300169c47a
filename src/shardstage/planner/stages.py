"""``best_cut``: the fastest cut of a chain of units into pipeline stages, with what each stage recomputes, under a memory limit.

    n units, p stages; t(s, i, j) are the seconds of units i..j-1 as stage s for one microbatch, by the least that it must recompute to fit
    (``planner.recompute``)

    minimise   (m - 1) max_s t_s + Σ_s t_s                     1F1B and GPipe with m microbatches (``cost.pipeline``)

For a cap on the slowest stage, how far s stages reach is greedy: a stage that takes more units never hurts those after it, which hold fewer
microbatches, and are no slower where all are alike (else all ends are kept where one stage is stuck). The least cap is found by bisection
and then step by step from cut to cut, until none is feasible below it. Where that cut recomputes anything, the sum matters too:

    least(s, j) = min over i of  least(s - 1, i) + t(s, i, j)   where t(s, i, j) <= cap

by dynamic programming, for each cap whose product alone could still win. The result is exact, up to the last bit of the sums, for this
objective; the optimizer, exposed reductions and transfers, which come on top of the pipeline, may choose another cut (``recut``).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple, Protocol

from shardstage.graph.recompute import StageRecompute

__all__ = ["Cut", "Fitted", "StageCosts", "best_cut", "earliest_starts"]

CAP_PRECISION: Final = 1e-4
"""Relative precision of the bisection; the last step to the least cap goes from cut to cut."""


class Cut(NamedTuple):
    """First units of the stages, what each recomputes, the slowest stage's seconds and those of all."""

    starts: tuple[int, ...]
    recompute: tuple[StageRecompute, ...]
    slowest_s: float
    total_s: float

    def pipeline_s(self, num_microbatches: int) -> float:
        return (num_microbatches - 1) * self.slowest_s + self.total_s


class Fitted(NamedTuple):
    """Seconds of a run of units for one microbatch, and what it recomputes."""

    seconds: float
    recompute: StageRecompute


class StageCosts(Protocol):
    """Seconds and memory of any run of units as any stage."""

    @property
    def num_units(self) -> int: ...
    @property
    def has_unlike_stages(self) -> bool:
        """Whether a later stage may be slower than one before it."""
        ...

    def plain_s(self, stage: int, start: int, stop: int) -> float:
        """Seconds of one microbatch if memory were no matter; never less with more units."""
        ...

    def fitted(self, stage: int, start: int, stop: int) -> Fitted | None:
        """The least that the stage's rank must recompute; None without the memory. Never quicker with more units, nor fitting if not with
        fewer."""
        ...


def best_cut(
    costs: StageCosts,
    num_stages: int,
    num_microbatches: int,
    *,
    below_s: float = math.inf,
    counts_sum: bool = True,
) -> Cut | None:
    """The best cut, or None where no cut fits into memory and can come below ``below_s``.

    ``counts_sum``: the formula above; without it only the slowest stage counts, ``m max t``, as under schedules that split backwards.
    """
    unavoidable_s = _unavoidable_s(costs, num_stages)
    most_s = math.inf
    if below_s != math.inf:
        if not counts_sum:
            most_s = below_s / num_microbatches
        elif num_microbatches > 1:
            most_s = (below_s - unavoidable_s) / (num_microbatches - 1)
    found = _least_cap(costs, num_stages, most_s)
    if found is None:
        return None
    least_s = (num_microbatches - 1) * found.slowest_s + min(unavoidable_s, found.total_s)
    if not counts_sum or least_s >= below_s or found.total_s <= unavoidable_s * (1 + 1e-12):
        return found
    return _with_least_sum(costs, num_stages, num_microbatches, found, unavoidable_s)


def _unavoidable_s(costs: StageCosts, num_stages: int) -> float:
    """What all stages take together at least: one stage of all units where nothing must be recomputed, on the quicker end of the pipeline.

    Cutting it only adds: each stage waits for a first gather of its own.
    """
    return min(costs.plain_s(stage, 0, costs.num_units) for stage in {0, num_stages - 1})


def _least_cap(costs: StageCosts, num_stages: int, most_s: float) -> Cut | None:
    """The cut whose slowest stage is fastest, and at most ``most_s``."""
    best = _reach(costs, num_stages, most_s)
    if best is None:
        return None
    least_s = min(costs.plain_s(stage, 0, costs.num_units) for stage in range(num_stages))
    low, high = least_s / num_stages, best.slowest_s
    exact = _reach(costs, num_stages, low * (1 + 1e-12))
    if exact is not None:
        return exact
    while high - low > CAP_PRECISION * high:
        middle = (low + high) / 2
        cut = _reach(costs, num_stages, middle)
        if cut is None:
            low = middle
        else:
            best, high = cut, min(middle, cut.slowest_s)
    while (cut := _reach(costs, num_stages, best.slowest_s * (1 - 1e-12))) is not None:
        best = cut
    return best


def _reach(costs: StageCosts, num_stages: int, cap: float) -> Cut | None:
    """Stages that take as many units as the cap and memory let them, leaving one for each stage after; None where that is not all."""
    start, length, starts, recompute = 0, 1, [], []
    slowest = total = 0.0
    for stage in range(num_stages):
        last = costs.num_units - (num_stages - stage - 1)
        stop = _farthest(costs, stage, start, last, cap, length)
        if stop == start and costs.has_unlike_stages:
            return _reach_around(costs, num_stages, cap)
        fitted = None if stop == start else costs.fitted(stage, start, stop)
        if fitted is None:
            return None
        slowest, total = max(slowest, fitted.seconds), total + fitted.seconds
        starts.append(start)
        recompute.append(fitted.recompute)
        start, length = stop, stop - start
    return Cut(tuple(starts), tuple(recompute), slowest, total) if start == costs.num_units else None


def _reach_around(costs: StageCosts, num_stages: int, cap: float) -> Cut | None:
    """As ``_reach``, by all ends that stages may have: where a unit is too much for a stage, one before it may leave it lighter
    ones and the next one take it."""
    came: list[dict[int, int]] = []
    reached: Iterable[int] = (0,)
    for stage in range(num_stages):
        last, following = costs.num_units - (num_stages - stage - 1), dict[int, int]()
        for start in reached:
            for stop in range(start + 1, _farthest(costs, stage, start, last, cap) + 1):
                following[stop] = start
        came.append(following)
        reached = following
    if costs.num_units not in reached:
        return None
    stop, spans = costs.num_units, []
    for following in reversed(came):
        spans.append((following[stop], stop))
        stop = following[stop]
    spans.reverse()
    each = [costs.fitted(stage, *span) for stage, span in enumerate(spans)]
    fitted = [found for found in each if found is not None]
    assert len(fitted) == num_stages, "what was reached fits"
    seconds = [found.seconds for found in fitted]
    starts, modes = tuple(start for start, _ in spans), tuple(found.recompute for found in fitted)
    return Cut(starts, modes, max(seconds), sum(seconds))


def _farthest(costs: StageCosts, stage: int, start: int, last: int, cap: float, length: int = 1) -> int:
    """The farthest end of a stage, by bisection over what is monotone: plain time first, which is cheaper to ask for than memory.

    ``length`` is a guess, such as the number of units of the stage before.
    """

    def is_quick(stop: int) -> bool:
        return costs.plain_s(stage, start, stop) <= cap

    def is_possible(stop: int) -> bool:
        fitted = costs.fitted(stage, start, stop)
        return fitted is not None and fitted.seconds <= cap

    in_time = last if cap == math.inf else _last(is_quick, start, last, start + length)
    if in_time == start or is_possible(in_time):
        return in_time
    return _last(is_possible, start, in_time - 1, start + length)


def _last(is_true: Callable[[int], bool], low: int, most: int, guess: int) -> int:
    """The last number up to ``most`` to which it is true, ``low`` where it is nowhere: in growing steps from the guess, then by halves."""
    high, step = most + 1, 1
    while high - low > 1:
        if not low < guess < high:
            guess = (low + high) // 2
        if is_true(guess):
            low, guess = guess, guess + step
        else:
            high, guess = guess, guess - step
        step *= 2
    return low


def _with_least_sum(
    costs: StageCosts,
    num_stages: int,
    num_microbatches: int,
    found: Cut,
    unavoidable_s: float,
) -> Cut:
    """The best of all caps: a larger one may let stages recompute less.

    Of equal cuts it is one whose first stages, which hold most microbatches, have fewer units: ``found`` fills those first.
    """
    most = (found.pipeline_s(num_microbatches) - unavoidable_s) / max(1, num_microbatches - 1)
    table = _table(costs, num_stages, most if num_microbatches > 1 else math.inf)
    best, best_s = found, found.pipeline_s(num_microbatches)
    caps = sorted({s for rows in table for row in rows for s, _ in row.values() if s >= found.slowest_s})
    for cap in caps:
        if (num_microbatches - 1) * cap + unavoidable_s >= best_s:
            break
        cut = _least_sum(table, costs.num_units, cap)
        if cut is not None and cut.pipeline_s(num_microbatches) <= best_s:
            best, best_s = cut, cut.pipeline_s(num_microbatches)
    return best


_Row = dict[int, Fitted]


def _table(costs: StageCosts, num_stages: int, most_s: float) -> list[list[_Row]]:
    """For each stage and reachable start the seconds, at most ``most_s``, of every end that fits, by the least recomputation."""
    n, earliest = costs.num_units, earliest_starts(costs, num_stages, most_s * (1 + 1e-12))
    table, reached = [], {0}
    for stage in range(num_stages):
        rows: list[_Row] = [{} for _ in range(n)]
        last = n - (num_stages - stage - 1)
        following: set[int] = set()
        for start in sorted(reached):
            for stop in range(max(start + 1, earliest[stage + 1]), last + 1):
                fitted = costs.fitted(stage, start, stop)
                if fitted is None or fitted.seconds > most_s * (1 + 1e-12):
                    break
                rows[start][stop] = fitted
                following.add(stop)
        table.append(rows)
        reached = following
    return table


def earliest_starts(costs: StageCosts, num_stages: int, most_s: float) -> list[int]:
    """Where each stage may begin at the earliest, that it and those after it end with the last unit and take at most ``most_s`` each."""
    starts = [*range(num_stages), costs.num_units]
    if most_s == math.inf:
        return starts
    for stage in range(num_stages - 1, 0, -1):
        stop = starts[stage + 1]

        def is_late(start: int, stage: int = stage, stop: int = stop) -> bool:
            return costs.plain_s(stage, start, stop) <= most_s

        starts[stage] = stage + bisect_left(range(stage, stop), True, key=is_late)
    return starts


def _least_sum(table: list[list[_Row]], num_units: int, cap: float) -> Cut | None:
    """The cut under a cap whose stages take least in all."""
    least = [0.0] + [math.inf] * num_units
    came: list[list[int]] = []
    for rows in table:
        following, origin = [math.inf] * (num_units + 1), [-1] * (num_units + 1)
        for start, row in enumerate(rows):
            if least[start] == math.inf:
                continue
            for stop, (seconds, _) in row.items():
                if seconds > cap * (1 + 1e-12):
                    continue
                if least[start] + seconds < following[stop]:
                    following[stop], origin[stop] = least[start] + seconds, start
        least = following
        came.append(origin)
    if least[num_units] == math.inf:
        return None
    stop, starts, modes, slowest = num_units, [], [], 0.0
    for stage in range(len(table) - 1, -1, -1):
        start = came[stage][stop]
        seconds, mode = table[stage][start][stop]
        starts.append(start)
        modes.append(mode)
        slowest = max(slowest, seconds)
        stop = start
    return Cut(tuple(reversed(starts)), tuple(reversed(modes)), slowest, least[num_units])
