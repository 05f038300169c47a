"""``simulate``: a Program and prices → the Timeline that they predict."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from shardstage.errors import ProgramError
from shardstage.program import Program
from shardstage.simulator.acts import Pricer
from shardstage.simulator.allocator import Replay, replay
from shardstage.simulator.holdings import Holdings
from shardstage.simulator.lanes import Lane, Lanes, lanes_of
from shardstage.simulator.memory import Holder, RankMemory, memory_of
from shardstage.simulator.periods import STEADY_PERIODS, Cut, Period, cut_rows, find_period, steady_s
from shardstage.simulator.prices import Prices
from shardstage.simulator.run import Run, run
from shardstage.timeline import STREAMS, MemorySample, Span, Stream, Timeline

__all__ = ["peak_bytes", "peak_holders", "reserved", "simulate", "step_time"]

FEWEST_PERIODS: Final = 2 * STEADY_PERIODS + 2
"""So many periods of the steady state are simulated at first."""


def simulate(
    program: Program, prices: Prices, holdings: Holdings | None = None, *, is_extrapolated: bool = True
) -> Timeline:
    """One step, predicted, with memory where ``holdings`` are given. One rank of each class of alike ones is in it (``alike``).

    ``is_extrapolated``: of a steady state only as much is walked as shows that it is one. Raises ``ProgramError`` for a program that cannot
    end.
    """
    lanes = lanes_of(program, prices.special_ranks, prices.classes)
    ran = _run(program, lanes, prices, keep_talks=True, is_extrapolated=is_extrapolated).whole()
    memory: list[MemorySample] = []
    if holdings is not None:
        for lane, starts_s, ends_s in zip(lanes.lanes, ran.starts_s, ran.ends_s, strict=True):
            memory += memory_of(program, lane, holdings, starts_s, ends_s).samples
    return Timeline(
        source="predicted",
        spans=tuple(_spans(lanes, ran)),
        memory=tuple(memory),
        alike={lane.rank: lanes.alike(lane) for lane in lanes.lanes},
        labels={lane.rank: _label(lane, lanes) for lane in lanes.lanes},
    )


def step_time(program: Program, prices: Prices, *, is_extrapolated: bool = True) -> float:
    """Seconds of one step: ``simulate(...).step_time_s`` without making spans."""
    lanes = lanes_of(program, prices.special_ranks, prices.classes)
    ran, cuts, period_s = _run(program, lanes, prices, keep_talks=False, is_extrapolated=is_extrapolated)
    return ran.makespan_s + (cuts[0].num_periods * period_s if cuts else 0.0)


def peak_holders(program: Program, rank: int, holdings: Holdings) -> tuple[Holder, ...]:
    """What ``rank`` holds at its peak, the biggest first; it depends on the order of instructions alone, not on their times."""
    return _untimed(program, rank, holdings).holders


def peak_bytes(program: Program, rank: int, holdings: Holdings) -> int:
    """The most that ``rank`` holds."""
    return _untimed(program, rank, holdings).peak_bytes


def reserved(program: Program, rank: int, holdings: Holdings, *, capacity_bytes: int | None = None) -> Replay:
    """What the caching allocator of a CUDA device reserves for ``rank``, and where it runs out of ``capacity_bytes``."""
    return replay(_untimed(program, rank, holdings).trace, capacity_bytes=capacity_bytes)


def _untimed(program: Program, rank: int, holdings: Holdings) -> RankMemory:
    lane = next(lane for lane in lanes_of(program, (rank,)).lanes if lane.rank == rank)
    positions = [float(at) for at in range(len(lane.instructions))]
    return memory_of(program, lane, holdings, positions, positions)


class _Ran(NamedTuple):
    """A run of rows out of which ``cuts`` were left (none: whole rows), whose periods take ``period_s``."""

    run: Run
    cuts: Sequence[Cut] = ()
    period_s: float = 0.0

    def whole(self) -> Run:
        return self.run.with_periods(self.cuts, self.period_s) if self.cuts else self.run


def _run(program: Program, lanes: Lanes, prices: Prices, *, keep_talks: bool, is_extrapolated: bool) -> _Ran:
    """As few periods of the steady state as show that it is one; all of it if it never is."""
    pricer = Pricer(program, lanes, prices)

    def walk(cuts: Sequence[Cut | None]) -> Run:
        rows = [
            pricer.acts_of(lane, lane.instructions, cut) for lane, cut in zip(lanes.lanes, cuts, strict=True)
        ]
        ran = run(
            rows,
            pricer.group_sizes,
            slowdown=prices.slowdown,
            overlap_slowdown=prices.overlap_slowdown,
            num_cores=prices.num_cores,
            ranks_of_rows=[lanes.num_alike(lane) for lane in lanes.lanes],
            keep_talks=keep_talks,
        )
        _require_end(ran, lanes, cuts)
        return ran

    periods = _periods(program, lanes) if is_extrapolated and prices.num_cores is None else []
    # What slows one rank down reaches the others a rank and a period at a time.
    for num_kept in (FEWEST_PERIODS, FEWEST_PERIODS + 4 * program.mesh.pp):
        cuts = cut_rows(periods, num_kept)
        if cuts is None:
            break
        ran = walk(cuts)
        period_s = steady_s(ran.ends_s, cuts)
        if period_s is not None:
            return _Ran(ran, cuts, period_s)
    return _Ran(walk([None] * len(lanes)))


def _require_end(ran: Run, lanes: Lanes, cuts: Sequence[Cut | None]) -> None:
    for lane, ends, starts, cut in zip(lanes.lanes, ran.ends_s, ran.starts_s, cuts, strict=True):
        if len(starts) > len(ends):
            at = len(ends) + (cut.stop - cut.at if cut and len(ends) >= cut.at else 0)
            raise ProgramError(
                f"the program cannot end: rank {lane.rank} waits in {lane.instructions[at].name} for ever",
                hint="verify(program) shows the grid and who waits for whom",
            )


def _periods(program: Program, lanes: Lanes) -> list[Period | None]:
    """By lane; none at all where there are few microbatches."""
    if program.num_microbatches < 2 * FEWEST_PERIODS:
        return []
    known: dict[tuple[int, tuple[int, ...]], Period | None] = {}
    for lane in lanes.lanes:
        key = (id(lane.instructions), lane.sizes)
        if key not in known:
            known[key] = find_period(lane.instructions, lane.sizes)
            if known[key] is None:
                return []
    return [known[id(lane.instructions), lane.sizes] for lane in lanes.lanes]


def _spans(lanes: Lanes, ran: Run) -> Iterator[Span]:
    """In order of (rank, stream, start); what would overlap in a stream begins later."""
    for lane in lanes.lanes:
        talks = ran.talks[lane.number]
        found: dict[Stream, list[tuple[float, float, int]]] = {"compute": _computations(lane, ran)}
        for position, stream, start_s, end_s in talks:
            found.setdefault(stream, []).append((start_s, end_s, position))
        for stream in STREAMS:
            until_s = 0.0
            for start_s, end_s, position in found.get(stream, ()):
                begins_s = max(start_s, until_s)
                if end_s > begins_s:
                    yield Span(lane.rank, stream, lane.instructions[position].name, begins_s, end_s)
                    until_s = end_s


def _computations(lane: Lane, ran: Run) -> list[tuple[float, float, int]]:
    """F, B, I and W without the talk at their end."""
    talk_s: dict[int, float] = {}
    for position, _, start_s, end_s in ran.talks[lane.number]:
        talk_s[position] = talk_s.get(position, 0.0) + end_s - start_s
    rows = zip(lane.instructions, ran.starts_s[lane.number], ran.ends_s[lane.number], strict=True)
    return [
        (start_s, end_s - talk_s.get(position, 0.0), position)
        for position, (instruction, start_s, end_s) in enumerate(rows)
        if instruction.is_computation
    ]


def _label(lane: Lane, lanes: Lanes) -> str:
    dp, tp = lanes.dp_classes[lane.dp_class][0], lanes.tp_classes[lane.tp_class][0]
    return f"pp={lane.pp} dp={dp} tp={tp}"
