"""``simulate``: a Program and prices → the Timeline that they predict."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from shardstage.program import Instruction, Program
from shardstage.simulator.acts import Pricer
from shardstage.simulator.lanes import Lane, Lanes, lanes_of
from shardstage.simulator.prices import Prices
from shardstage.simulator.run import Run, run
from shardstage.timeline import Span, Stream, Timeline

__all__ = ["simulate", "step_time"]


def simulate(program: Program, prices: Prices) -> Timeline:
    """One step, predicted. One rank of each class of alike ones has spans (``Timeline.alike``).

    Raises ``ProgramError`` for a program that cannot end.
    """
    lanes = lanes_of(program, prices.special_ranks)
    ran = _run(program, lanes, prices, keep_talks=True)
    return Timeline(
        source="predicted",
        spans=tuple(_spans(lanes, ran)),
        alike={lane.rank: lanes.alike(lane) for lane in lanes.lanes},
        labels={lane.rank: _label(lane, lanes) for lane in lanes.lanes},
    )


def step_time(program: Program, prices: Prices) -> float:
    """Seconds of one step: ``simulate(...).step_time_s`` without making spans."""
    lanes = lanes_of(program, prices.special_ranks)
    return _run(program, lanes, prices, keep_talks=False).makespan_s


def _run(program: Program, lanes: Lanes, prices: Prices, *, keep_talks: bool) -> Run:
    pricer = Pricer(program, lanes, prices)
    rows = [pricer.acts_of(lane, lane.instructions) for lane in lanes.lanes]
    return run(
        rows,
        pricer.group_sizes,
        slowdown=prices.slowdown,
        num_cores=prices.num_cores,
        keep_talks=keep_talks,
    )


def _spans(lanes: Lanes, ran: Run) -> Iterator[Span]:
    for lane in lanes.lanes:
        number = lane.number
        yield from _compute_spans(lane, ran.starts_s[number], ran.ends_s[number], ran.talks[number])
        by_stream: dict[Stream, list[Span]] = {"tp": [], "dp": [], "pp": []}
        for position, stream, start_s, end_s in ran.talks[number]:
            spans = by_stream[stream]
            begins_s = max(start_s, spans[-1].end_s) if spans else start_s
            if end_s > begins_s:
                name = lane.instructions[position].name
                spans.append(Span(lane.rank, stream, name, begins_s, end_s))
        for spans in by_stream.values():
            yield from spans


def _compute_spans(
    lane: Lane,
    starts_s: Sequence[float],
    ends_s: Sequence[float],
    talks: Sequence[tuple[int, Stream, float, float]],
) -> Iterator[Span]:
    """Computations without the talk at their end, and the update without the talk around it."""
    talk_s: dict[int, float] = {}
    for position, _, start_s, end_s in talks:
        talk_s[position] = talk_s.get(position, 0.0) + end_s - start_s
    for position, instruction in enumerate(lane.instructions):
        if instruction.is_computation or instruction.kind == "STEP":
            start_s = starts_s[position]
            end_s = _computed_until(instruction, start_s, ends_s[position], talk_s.get(position, 0.0))
            if end_s > start_s:
                yield Span(lane.rank, "compute", instruction.name, start_s, end_s)


def _computed_until(instruction: Instruction, start_s: float, end_s: float, talk_s: float) -> float:
    return max(start_s, end_s - talk_s)


def _label(lane: Lane, lanes: Lanes) -> str:
    dp, tp = lanes.dp_classes[lane.dp_class][0], lanes.tp_classes[lane.tp_class][0]
    return f"pp={lane.pp} dp={dp} tp={tp}"
