"""``run``: walks the acts of all lanes until none is left: when each begins and ends.

A lane is a coroutine with a clock of its own. It goes on until it needs a message that has not been sent or lanes that have not come, and
is taken up again by what it waits for. As nothing but messages and meetings joins lanes, their clocks need no common order. Where ranks
share cores there is one: what they compute, and their ends of messages, are then served in order of time, n ranks at a rate of
min(1, cores / n) each. A lane takes as much of the cores as the ranks that it stands for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import cast

from shardstage.simulator.acts import ALONE, COMPUTE, RECEIVE, SEND, TALK, Act, Departure, Reduction, Talk
from shardstage.simulator.periods import Cut
from shardstage.timeline import Stream

__all__ = ["Run", "run"]

_Wanted = tuple[float, float] | None
"""A coroutine asks for (seconds from, seconds of) work on shared cores, or for nothing until it is woken."""

_Said = tuple[int, Stream, float, float]


@dataclass(kw_only=True, slots=True)
class Run:
    """``starts_s[l][i]`` and ``ends_s[l][i]`` are of act i of lane l.

    ``talks[l]`` is what the lane says, and its update: (position, stream, start, end), in order of start in each stream.
    """

    starts_s: list[list[float]]
    ends_s: list[list[float]]
    talks: list[list[_Said]] = field(default_factory=list)

    @property
    def makespan_s(self) -> float:
        return max((ends[-1] for ends in self.ends_s if ends), default=0.0)

    def with_periods(self, cuts: Sequence[Cut], period_s: float) -> Run:
        """The run of the whole rows, of which ``cuts`` were left out: each period that was is ``period_s`` after the one before."""
        return Run(
            starts_s=[_filled(row, cut, period_s) for row, cut in zip(self.starts_s, cuts, strict=True)],
            ends_s=[_filled(row, cut, period_s) for row, cut in zip(self.ends_s, cuts, strict=True)],
            talks=[_filled_talks(row, cut, period_s) for row, cut in zip(self.talks, cuts, strict=True)],
        )


def _filled(row: Sequence[float], cut: Cut, period_s: float) -> list[float]:
    period, filled = row[cut.at : cut.at + cut.length], list(row[: cut.at])
    for number in range(cut.num_periods):
        later_s = number * period_s
        filled += [time_s + later_s for time_s in period]
    later_s = cut.num_periods * period_s
    return filled + [time_s + later_s for time_s in row[cut.at :]]


def _filled_talks(talks: Sequence[_Said], cut: Cut, period_s: float) -> list[_Said]:
    before = [said for said in talks if said[0] < cut.at]
    period = [said for said in talks if cut.at <= said[0] < cut.at + cut.length]
    after = [said for said in talks if said[0] >= cut.at]
    repeated = [
        _later(said, number, cut.length, period_s) for number in range(cut.num_periods) for said in period
    ]
    return [*before, *repeated, *(_later(said, cut.num_periods, cut.length, period_s) for said in after)]


def _later(said: _Said, num_periods: int, length: int, period_s: float) -> _Said:
    position, stream, start_s, end_s = said
    later_s = num_periods * period_s
    return position + num_periods * length, stream, start_s + later_s, end_s + later_s


def run(
    rows: Sequence[Sequence[Act]],
    group_sizes: Mapping[int, int],
    *,
    slowdown: float = 1.0,
    overlap_slowdown: float = 0.0,
    num_cores: float | None = None,
    ranks_of_rows: Sequence[int] = (),
    keep_talks: bool = False,
) -> Run:
    """Walks until nothing more can run; a row that waits for ever has fewer ends than acts.

    ``ranks_of_rows``: how many ranks each row stands for on the cores that all share; by default one.
    """
    walk = _Walk(
        rows, group_sizes, slowdown, overlap_slowdown, is_shared=num_cores is not None, keep_talks=keep_talks
    )
    if num_cores is None:
        return walk.run()
    return walk.run_on_cores(num_cores, ranks_of_rows or [1] * len(rows))


class _Walk:
    def __init__(
        self,
        rows: Sequence[Sequence[Act]],
        group_sizes: Mapping[int, int],
        slowdown: float,
        overlap_slowdown: float,
        *,
        is_shared: bool,
        keep_talks: bool,
    ) -> None:
        self.rows = rows
        self.group_sizes = group_sizes
        self.slowdown = slowdown
        self.overlap_slowdown = overlap_slowdown
        self.is_shared = is_shared
        self.keep_talks = keep_talks
        self.result = Run(starts_s=[[] for _ in rows], ends_s=[[] for _ in rows], talks=[[] for _ in rows])
        self.arrived_s: dict[int, float] = {}
        self.waiting: dict[int, int] = {}
        self.meetings: dict[tuple[int, int], tuple[tuple[float, ...], list[int]]] = {}
        self.met: dict[tuple[int, int], tuple[float, ...]] = {}
        self.ready: deque[int] = deque(range(len(rows)))
        self.lanes = [self._lane(number) for number in range(len(rows))]

    def run(self) -> Run:
        """Each rank has its own device."""
        while self.ready:
            next(self.lanes[self.ready.popleft()], None)
        return self.result

    def run_on_cores(self, num_cores: float, ranks_of_rows: Sequence[int]) -> Run:
        """All that want cores at a time get as much of them, ``rate`` of one for each rank.

        ``served_s`` is what a rank has got that has wanted them since they were last idle: a lane is done when that has grown by its
        seconds.
        """
        requests: list[tuple[float, int, float]] = []
        running: list[tuple[float, int]] = []
        answers: dict[int, float] = {}
        now = served_s = 0.0
        num_ranks = 0
        while True:
            while self.ready:
                number = self.ready.popleft()
                wanted = _resume(self.lanes[number], answers.pop(number, None))
                if wanted is not None:
                    heappush(requests, (wanted[0], number, wanted[1]))
            if not requests and not running:
                return self.result
            rate = min(1.0, num_cores / num_ranks) if running else 1.0
            done_s = now + (running[0][0] - served_s) / rate if running else float("inf")
            begins_s = max(now, requests[0][0]) if requests else float("inf")
            if begins_s < done_s:
                served_s = served_s + (begins_s - now) * rate if running else 0.0
                now, number, seconds = begins_s, *heappop(requests)[1:]
                heappush(running, (served_s + seconds, number))
                num_ranks += ranks_of_rows[number]
                continue
            now, served_s = done_s, running[0][0]
            while running and running[0][0] <= served_s + 1e-15 + 1e-12 * now:
                number = heappop(running)[1]
                num_ranks -= ranks_of_rows[number]
                answers[number] = now
                self.ready.append(number)

    def _lane(self, number: int) -> Generator[_Wanted, float | None, None]:
        """The life of a lane."""
        arrived_s, waiting, ready = self.arrived_s, self.waiting, self.ready
        begin, end = self.result.starts_s[number].append, self.result.ends_s[number].append
        slowdown = self.slowdown
        talks = self.result.talks[number] if self.keep_talks else None
        link_free_s: dict[int, float] = {}
        counts: dict[int, int] = {}
        clock = busy_until = 0.0
        for position, (kind, own_s, latency_s, bytes_s, key, more) in enumerate(self.rows[number]):
            begin(clock)
            if kind == COMPUTE:
                if slowdown != 1.0 and busy_until > clock:
                    own_s += (slowdown - 1.0) * min(busy_until - clock, own_s)
                clock = yield from self._work(clock, own_s)
                if key != ALONE:
                    (clock,) = yield from self._meet(number, key, counts, (clock,))
                if latency_s:
                    if talks is not None:
                        stream: Stream = "tp" if bytes_s else "dp"
                        talks.append((position, stream, clock, clock + latency_s))
                    clock += latency_s
            elif kind == RECEIVE:
                when = arrived_s.get(key)
                if when is None:
                    waiting[key] = number
                    yield None
                    when = arrived_s[key]
                clock = max(clock, when)
                if core_s := cast("float", more):
                    clock = yield from self._work(clock, core_s)
                clock += own_s
            elif kind == SEND:
                link, core_s = cast("Departure", more)
                if core_s:
                    clock = yield from self._work(clock, core_s)
                clock += own_s
                departs = max(clock, link_free_s.get(link, 0.0))
                link_free_s[link] = departs + bytes_s
                busy_until = max(busy_until, departs + bytes_s)
                arrived_s[key] = departs + bytes_s + latency_s
                if talks is not None:
                    talks.append((position, "pp", departs, departs + bytes_s + latency_s))
                if key in waiting:
                    ready.append(waiting.pop(key))
            elif kind == TALK:
                clock = yield from self._talk(number, position, cast("tuple[Talk, ...]", more), counts, clock)
            else:
                reduction = cast("Reduction", more)
                clock = yield from self._reduce(number, position, reduction, counts, clock)
                clock = yield from self._talk(number, position, reduction.after, counts, clock + own_s)
            end(clock)

    def _work(self, clock: float, seconds: float) -> Generator[_Wanted, float | None, float]:
        """When work that may begin at ``clock`` is done: on the cores that ranks share, or on the rank's own device."""
        return cast("float", (yield clock, seconds)) if self.is_shared else clock + seconds

    def _talk(
        self, number: int, position: int, talks: Sequence[Talk], counts: dict[int, int], clock: float
    ) -> Generator[_Wanted, float | None, float]:
        for talk in talks:
            if talk.group != ALONE:
                (clock,) = yield from self._meet(number, talk.group, counts, (clock,))
            if self.keep_talks and talk.seconds:
                self.result.talks[number].append((position, talk.stream, clock, clock + talk.seconds))
            clock += talk.seconds
        return clock

    def _reduce(
        self, number: int, position: int, reduction: Reduction, counts: dict[int, int], clock: float
    ) -> Generator[_Wanted, float | None, float]:
        """Each bucket begins when all have filled it and the one before is done, and slows down the backward that it runs beside.

        ``late_s`` is how much later than without buckets compute is; what ends before its bucket does is late in name only. What comes
        after the compute is ``weighed`` by the calibration.
        """
        starts, ends = self.result.starts_s[number], self.result.ends_s[number]
        whole_s: tuple[float, ...] = tuple(
            starts[at] + share * (ends[at] - starts[at]) for at, share, _ in reduction.buckets
        )
        if reduction.group != ALONE:
            whole_s = yield from self._meet(number, reduction.group, counts, whole_s)

        def weighed(time_s: float) -> float:
            late_s = time_s - clock
            return clock + reduction.weight * late_s if reduction.weight != 1.0 and late_s > 0 else time_s

        done_s = late_s = 0.0
        for ready_s, bucket in zip(whole_s, reduction.buckets, strict=True):
            begins_s = max(ready_s + late_s, done_s)
            done_s = begins_s + bucket.seconds
            if begins_s < clock + late_s:
                late_s += self.overlap_slowdown * bucket.seconds
            if self.keep_talks and bucket.seconds:
                self.result.talks[number].append((position, "dp", weighed(begins_s), weighed(done_s)))
        return weighed(max(clock + late_s, done_s))

    def _meet(
        self, number: int, group: int, counts: dict[int, int], mine: tuple[float, ...]
    ) -> Generator[_Wanted, float | None, tuple[float, ...]]:
        """The latest of all members' times, elementwise, once all have come to the group's next meeting."""
        count = counts[group] = counts.get(group, 0) + 1
        key = (group, count)
        latest, members = self.meetings.pop(key, (mine, []))
        latest = tuple(map(max, latest, mine))
        if len(members) + 1 == self.group_sizes[group]:
            self.met[key] = latest
            self.ready.extend(members)
            return latest
        self.meetings[key] = (latest, [*members, number])
        yield None
        return self.met[key]


def _resume(lane: Generator[_Wanted, float | None, None], answer: float | None) -> _Wanted:
    """What the lane wants next; ``None`` too when it has ended."""
    try:
        return next(lane) if answer is None else lane.send(answer)
    except StopIteration:
        return None
