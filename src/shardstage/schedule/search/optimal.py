"""``optimal``: the fastest schedule that a search finds, and how far from the best it can be."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from shardstage.errors import ProgramError
from shardstage.schedule.action import Action, Schedule
from shardstage.schedule.places import place_stages
from shardstage.schedule.registry import SCHEDULES, make_schedule
from shardstage.schedule.search.bound import least_makespan_s
from shardstage.schedule.search.exact import PRECISION_RATIO, solve_exactly
from shardstage.schedule.search.exchange import improve
from shardstage.schedule.search.policies import best_rows
from shardstage.schedule.search.problem import Problem, Rows, make_problem, rows_of, schedule_of, trace
from shardstage.schedule.timing import StageBytes, StageTimes, run_schedule

__all__ = ["OptimalSchedule", "optimal"]


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimalSchedule:
    """A schedule with the end of its last action under ``run_schedule``, and ``bound_s``, which no schedule of these stages on these
    ranks can end before.

    ``is_proved`` says that the two are equal, to 1e-5 of the makespan. ``named`` and ``named_s`` are the best of the named schedules that
    fit the memory limit, ``None`` if none does.
    """

    schedule: Schedule
    makespan_s: float
    bound_s: float
    is_proved: bool
    named: str | None
    named_s: float | None


def optimal(
    times: Sequence[StageTimes],
    num_microbatches: int,
    *,
    num_ranks: int | None = None,
    stage_ranks: tuple[int, ...] | None = None,
    memory: Sequence[StageBytes] = (),
    memory_limit_bytes: int | None = None,
    max_seconds: float = 2.0,
    seed: int = 0,
) -> OptimalSchedule:
    """The fastest schedule found in about ``max_seconds``, never slower than any named one that fits the limit.

    Stages go to ranks as ``stage_ranks`` says, or in each way that a named schedule places ``len(times)`` stages on ``num_ranks`` (one
    for each stage by default). ``memory_limit_bytes`` is what activations (``memory``) may take on each rank. First the named schedules
    and one microbatch at a time; then list scheduling under many policies; then local search, and for small problems an exact method.
    The order of actions depends on the machine's speed through ``max_seconds``: keep the result, as text. ``ProgramError`` if not even
    one microbatch fits.
    """
    began_s = time.monotonic()
    limit = math.inf if memory_limit_bytes is None else memory_limit_bytes
    placements = _placements(len(times), num_ranks, stage_ranks)
    if num_microbatches < 1 or len(memory) not in (0, len(times)):
        raise ProgramError(
            f"{num_microbatches} microbatches, times of {len(times)} stages and bytes of {len(memory)} are no problem to solve",
            hint="at least one microbatch, and one StageBytes or none for each stage",
        )
    search = _Search(times, num_microbatches, memory, limit, placements)
    named = search.best
    bound_s = min(least_makespan_s(search.relaxed(ranks)) for ranks in placements)
    if search.best is None:
        search.start_with_one_at_a_time()
    assert search.best is not None, "one microbatch at a time fits or is refused"
    problems = list(search.problems())
    proved: dict[tuple[int, ...], float] = {}
    for number, problem in enumerate(problems):
        share_s = (began_s + max_seconds - time.monotonic()) / (len(problems) - number)
        found_s = search.solve(problem, bound_s, share_s, random.Random(seed))
        if problem.is_split and search.is_split_enough:
            proved[problem.stage_ranks] = found_s
    if len(proved) == len(placements):
        bound_s = max(bound_s, min(proved.values()))
    search.fuse()
    assert bound_s <= search.best.makespan_s * (1 + PRECISION_RATIO), "no schedule beats the bound"
    bound_s = min(bound_s, search.best.makespan_s)  # but for rounding
    return OptimalSchedule(
        schedule=search.best.schedule,
        makespan_s=search.best.makespan_s,
        bound_s=bound_s,
        is_proved=search.best.makespan_s <= bound_s * (1 + 1.01 * PRECISION_RATIO),
        named=None if named is None else named.schedule.name,
        named_s=None if named is None else named.makespan_s,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Found:
    schedule: Schedule
    makespan_s: float


class _Search:
    """The best schedule so far, and the ways to a better one."""

    def __init__(
        self,
        times: Sequence[StageTimes],
        num_microbatches: int,
        memory: Sequence[StageBytes],
        limit: float,
        placements: Sequence[tuple[int, ...]],
    ) -> None:
        self.times = times
        self.m = num_microbatches
        self.memory = memory
        self.limit = limit
        self.placements = placements
        self.best: _Found | None = None
        for schedule in _named(placements, num_microbatches):
            self._offer(schedule)

    @property
    def is_split_enough(self) -> bool:
        """Whether I and W can stand for any B: it takes as long as both, and I frees before its end what it frees."""
        return all(t.whole_backward_s >= t.input_s + t.weight_s for t in self.times) and all(
            part.freed_by_input_bytes >= 0 for part in self.memory
        )

    def start_with_one_at_a_time(self) -> None:
        """A microbatch through all stages and back before the next: nothing holds less."""
        least = math.inf
        for ranks in self.placements:
            for is_split in (False, True):
                problem = self._problem(ranks, is_split=is_split)
                tokens = [3 * s for s in range(len(ranks))]
                for s in reversed(range(len(ranks))):
                    tokens += [3 * s + kind for kind in problem.kinds[1:]]
                rows = [[t for t in tokens if ranks[t // 3] == r] * self.m for r in range(problem.num_ranks)]
                schedule = schedule_of(problem, rows, "optimal")
                least = min(least, max(run_schedule(schedule, self.times, self.memory).peak_bytes))
                self._offer(schedule)
        if self.best is None:
            raise ProgramError(
                f"one microbatch at a time holds {least} bytes on a rank, and the limit is {self.limit}",
                hint=f"memory_limit_bytes={least}",
            )

    def problems(self) -> Iterator[Problem]:
        """Each placement, with split backwards and, where that may be faster, with whole ones."""
        for ranks in self.placements:
            yield self._problem(ranks, is_split=True)
            if not self.is_split_enough:
                yield self._problem(ranks, is_split=False)

    def relaxed(self, stage_ranks: tuple[int, ...]) -> Problem:
        """A problem whose every I and W is as short, and holds as little, as a B that stands for them would."""
        times = []
        for t in self.times:
            input_s = min(t.input_s, t.whole_backward_s)
            weight_s = min(t.whole_backward_s, t.input_s + t.weight_s) - input_s
            times.append(replace(t, input_s=input_s, weight_s=max(0.0, weight_s)))
        memory = [replace(b, freed_by_input_bytes=max(0, b.freed_by_input_bytes)) for b in self.memory]
        return make_problem(times, memory, self.m, stage_ranks, self.limit, is_split=True)

    def solve(self, problem: Problem, bound_s: float, max_seconds: float, rng: random.Random) -> float:
        """Offers what list scheduling, local search and the exact method find; a bound on the makespan of this problem's schedules."""
        assert self.best is not None
        deadline_s = time.monotonic() + max_seconds
        rows = [rows_of(problem, schedule) for schedule in _named([problem.stage_ranks], self.m)]
        if self.best.schedule.stage_ranks == problem.stage_ranks:
            rows.append(rows_of(problem, self.best.schedule))
        starts = [found for found in rows if all(map(problem.fits, found))]
        starts += best_rows(problem, bound_s, _clock(0.3 * max_seconds), rng)
        ran = [(run.makespan_s, found) for found in starts if (run := trace(problem, found)) is not None]
        ran.sort(key=lambda pair: pair[0])
        for number, (_, found) in enumerate(ran[:2]):
            share_s = max(0.0, deadline_s - time.monotonic()) * (0.3, 0.4)[number]
            better, _ = improve(problem, found, bound_s, _clock(share_s), rng)
            self._offer(schedule_of(problem, better, "optimal"))
        return self._finish(problem, bound_s, deadline_s, rng)

    def fuse(self) -> None:
        """Makes I and W that follow each other one B again, where that ends no later: it costs the runtime less."""
        assert self.best is not None
        whole = _fused(self.best.schedule, range(self.best.schedule.num_stages))
        if self._offer(whole, or_equal=True):
            return
        for stage in range(self.best.schedule.num_stages):
            self._offer(_fused(self.best.schedule, [stage]), or_equal=True)

    def _finish(self, problem: Problem, bound_s: float, deadline_s: float, rng: random.Random) -> float:
        """The exact method, and if the problem is too large for it, more local search."""
        assert self.best is not None
        left_s = deadline_s - time.monotonic()
        if left_s <= 0 or self.best.makespan_s <= bound_s * (1 + PRECISION_RATIO):
            return bound_s
        answer = solve_exactly(problem, self.best.makespan_s, bound_s, left_s)
        if answer is not None:
            if answer.rows is not None and trace(problem, answer.rows) is not None:
                self._offer(schedule_of(problem, answer.rows, "optimal"))
            return answer.bound_s
        if self.best.schedule.stage_ranks == problem.stage_ranks:
            rows: Rows = rows_of(problem, self.best.schedule)
            if all(map(problem.fits, rows)):
                better, _ = improve(problem, rows, bound_s, _clock(left_s), rng)
                self._offer(schedule_of(problem, better, "optimal"))
        return bound_s

    def _problem(self, stage_ranks: tuple[int, ...], *, is_split: bool) -> Problem:
        return make_problem(self.times, self.memory, self.m, stage_ranks, self.limit, is_split=is_split)

    def _offer(self, schedule: Schedule, *, or_equal: bool = False) -> bool:
        """Takes the schedule if it fits and is the fastest so far."""
        run = run_schedule(schedule, self.times, self.memory)
        if max(run.peak_bytes) > self.limit:
            return False
        best_s = math.inf if self.best is None else self.best.makespan_s
        if run.makespan_s < best_s or (or_equal and run.makespan_s == best_s):
            self.best = _Found(schedule=schedule, makespan_s=run.makespan_s)
            return True
        return False


def _placements(
    num_stages: int, num_ranks: int | None, stage_ranks: tuple[int, ...] | None
) -> list[tuple[int, ...]]:
    if stage_ranks is not None:
        if len(stage_ranks) != num_stages or set(stage_ranks) != set(range(max(stage_ranks) + 1)):
            raise ProgramError(
                f"stage_ranks={stage_ranks} does not place {num_stages} stages on all of its ranks",
                hint=f"stage_ranks={tuple(range(num_stages))}",
            )
        return [stage_ranks]
    num_ranks = num_stages if num_ranks is None else num_ranks
    if num_ranks < 1 or num_stages < 1 or num_stages % num_ranks:
        raise ProgramError(
            f"{num_stages} stages cannot be placed equally on {num_ranks} ranks",
            hint="stage_ranks=(0, 1, 1), the rank of every stage",
        )
    per_rank = num_stages // num_ranks
    placements = [place_stages("loop", num_ranks, per_rank)]
    if per_rank == 2 and num_ranks > 1:
        placements.append(place_stages("v", num_ranks, 2))
    return placements


def _named(placements: Sequence[tuple[int, ...]], num_microbatches: int) -> Iterator[Schedule]:
    """Every named schedule that trains and places stages in one of these ways."""
    for kind in SCHEDULES.values():
        num_stages, num_ranks = len(placements[0]), max(placements[0]) + 1
        if kind.name == "forward-only" or num_stages % num_ranks or not kind.takes(num_stages // num_ranks):
            continue
        schedule = make_schedule(
            kind.name, num_stages=num_stages, num_ranks=num_ranks, num_microbatches=num_microbatches
        )
        if schedule.stage_ranks in placements:
            yield schedule


def _fused(schedule: Schedule, stages: Sequence[int]) -> Schedule:
    rows = []
    for row in schedule.actions:
        fused: list[Action] = []
        for action in row:
            before = Action(action.stage, "I", action.microbatch)
            if action.kind == "W" and action.stage in stages and fused and fused[-1] == before:
                fused[-1] = Action(action.stage, "B", action.microbatch)
            else:
                fused.append(action)
        rows.append(tuple(fused))
    return replace(schedule, actions=tuple(rows))


def _clock(seconds: float) -> Callable[[], float]:
    """Goes from 1 to 0 in so many seconds."""
    began_s = time.monotonic()
    if seconds <= 0:
        return lambda: 0.0
    return lambda: 1 - (time.monotonic() - began_s) / seconds
