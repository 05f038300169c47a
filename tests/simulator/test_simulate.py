"""Steps whose length is known by hand or from the schedules' own timing, and what many alike ranks cost."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from tests.simulator.programs import MESSAGE_BYTES, pipeline, prices

from shardstage.errors import ProgramError
from shardstage.program import Program
from shardstage.schedule import SCHEDULES, StageTimes, make_schedule, run_schedule
from shardstage.simulator import PriceTable, simulate, step_time
from shardstage.simulator.acts import Act
from shardstage.simulator.run import Run, run

EVERY = [(name, 2 if kind.places != "one" else 1) for name, kind in SCHEDULES.items()]


@pytest.mark.parametrize(("name", "stages_per_rank"), EVERY)
def test_a_schedule_takes_what_its_own_timing_says(name: str, stages_per_rank: int) -> None:
    """Two walks over the same order, written apart: actions there, instructions here."""
    drawn, num_stages = random.Random(name), 4 * stages_per_rank
    program = pipeline(name, 4, 12, stages_per_rank=stages_per_rank)
    times = [
        StageTimes(forward_s=drawn.uniform(1, 2), input_s=drawn.uniform(1, 2), weight_s=drawn.uniform(1, 2))
        for _ in range(num_stages)
    ]
    compute = {
        (stage, kind): seconds
        for stage, time in enumerate(times)
        for kind, seconds in zip("FIWB", (time.forward_s, time.input_s, time.weight_s, time.whole_backward_s), strict=True)
    }  # fmt: skip
    schedule = make_schedule(name, num_stages=num_stages, num_ranks=4, num_microbatches=12)
    lag_s = 0.25
    moved = [replace(time, receive_s=lag_s if stage else 0.0) for stage, time in enumerate(times)]
    found = step_time(program, PriceTable(compute=compute, latency_s=lag_s))
    assert found == pytest.approx(run_schedule(schedule, moved).makespan_s)


def test_1f1b_and_gpipe_take_the_published_time() -> None:
    for name in ("1f1b", "gpipe"):
        assert step_time(pipeline(name, 4, 8), prices(4)) == (8 + 4 - 1) * 3


def test_a_link_carries_one_message_at_a_time() -> None:
    """The first rank's forwards take no time, the messages a second each: eight of them one after the other, then the last one's F."""
    slow = prices(2, bytes_per_s=MESSAGE_BYTES)
    quick = replace(slow, compute={**slow.compute, (0, "F"): 0.0})
    timeline = simulate(pipeline("gpipe", 2, 8), quick)
    sends = [span for span in timeline.spans_of(0, "pp") if "SEND_F" in span.name]
    assert [(span.start_s, span.end_s) for span in sends] == [(i, i + 1.0) for i in range(8)]
    assert next(s for s in timeline.spans_of(1, "compute") if s.name == "1F7").start_s == 8.0


def test_a_send_slows_down_the_computation_under_it() -> None:
    """Rank 0 sends under its second forward for half a second; twice as slow together, that forward takes half a second more."""
    program = pipeline("gpipe", 2, 2)
    table = prices(2, bytes_per_s=2 * MESSAGE_BYTES)
    found = {s.name: s.duration_s for s in simulate(program, replace(table, slowdown=2.0)).spans_of(0)}
    assert found["0F1"] == 1.5 and found["0F0"] == 1.0


def test_reductions_hide_under_the_last_backward_as_far_as_they_can() -> None:
    """Two buckets of a second: the first may begin in the middle of a backward of two seconds, the second at its end."""
    program = pipeline("1f1b", 1, 4, dp=2)
    table = prices(1, bytes_per_s=2_000_000)
    assert step_time(program, table) == 4 * 3 + 1
    timeline = simulate(program, table)
    assert [(s.start_s, s.end_s) for s in timeline.spans_of(0, "dp")] == [(11, 12), (12, 13)]
    assert step_time(program, replace(table, slowdown=2.0)) == 4 * 3 + 2, "as if none had been hidden"


def test_a_reduction_slows_down_the_backward_that_it_hides_under() -> None:
    """Half as slow again: the bucket beside the second half makes the backward end at 12.5, and the last one begins then."""
    program = pipeline("1f1b", 1, 4, dp=2)
    table = replace(prices(1, bytes_per_s=2_000_000), slowdown=1.5)
    assert step_time(program, table) == 4 * 3 + 0.5 + 1
    timeline = simulate(program, table)
    assert [(s.start_s, s.end_s) for s in timeline.spans_of(0, "dp")] == [(11, 12), (12.5, 13.5)]


def test_alike_ranks_are_simulated_once() -> None:
    whole, one = pipeline("1f1b", 4, 8, dp=4096), pipeline("1f1b", 4, 8, dp=2)
    timeline = simulate(whole, prices(4))
    assert timeline.ranks == (0, 4096, 8192, 12288)
    assert timeline.alike[4096] == tuple(range(4096, 8192))
    assert timeline.labels[4096] == "pp=1 dp=0 tp=0"
    assert timeline.step_time_s == step_time(one, prices(4))


def test_one_special_rank_holds_up_those_it_meets() -> None:
    """Data-parallel rank 1 of the second stage is three times as slow: it alone leaves its class, and all wait for it."""
    program = pipeline("1f1b", 2, 8, dp=3)

    class Slow(PriceTable):
        def compute_s(self, rank: int, stage: int, kind: str, size: int) -> float:  # type: ignore[override]
            return (3.0 if rank == 4 else 1.0) * super().compute_s(rank, stage, kind, size)  # type: ignore[arg-type]

    slow = Slow(compute=prices(2).compute, special_ranks=(4,))
    timeline = simulate(program, slow)
    assert timeline.alike == {0: (0, 2), 1: (1,), 3: (3, 5), 4: (4,)}
    assert timeline.busy_s(4) == 3 * timeline.busy_s(3)
    assert step_time(program, slow) >= 3 * 8 * 3


@pytest.mark.parametrize(
    ("name", "num_ranks", "stages_per_rank", "num_microbatches"),
    [
        ("1f1b", 8, 1, 96),
        ("1f1b", 1, 1, 40),
        ("interleaved-1f1b", 4, 3, 96),
        ("zb-h1", 4, 1, 64),
        ("zb-v", 4, 2, 64),
        ("dualpipe-v", 3, 2, 64),
        ("gpipe", 4, 1, 64),
        ("looped-bfs", 4, 2, 64),
    ],
)
def test_what_is_extrapolated_equals_the_whole_simulation(
    name: str, num_ranks: int, stages_per_rank: int, num_microbatches: int
) -> None:
    program = pipeline(name, num_ranks, num_microbatches, stages_per_rank=stages_per_rank)
    for seed in range(4):
        drawn = random.Random(seed)
        compute = {
            (stage, kind): drawn.uniform(0.5, 1.5) if seed else 1.0
            for stage in range(program.num_stages)
            for kind in "FBIW"
        }
        table = PriceTable(
            compute=compute,
            latency_s=drawn.choice([0, 0.1, 1]),
            bytes_per_s=MESSAGE_BYTES * drawn.choice([1, 10, 1e9]),
            slowdown=drawn.choice([1, 1.5]),
        )
        quick, drawn_spans = step_time(program, table), simulate(program, table).spans
        assert quick == pytest.approx(step_time(program, table, is_extrapolated=False), rel=1e-9)
        whole = simulate(program, table, is_extrapolated=False).spans
        assert [(s.rank, s.stream, s.name) for s in drawn_spans] == [
            (s.rank, s.stream, s.name) for s in whole
        ]
        found, expected = ([t for s in spans for t in (s.start_s, s.end_s)] for spans in (drawn_spans, whole))
        assert found == pytest.approx(expected, rel=1e-9)


def test_a_steady_state_is_walked_in_few_periods(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 stages × 512 microbatches: 64 warm-ups and a few periods of each rank, not 512."""
    walked: list[int] = []

    def counting(rows: Sequence[Sequence[Act]], *args: Any, **kwargs: Any) -> Run:
        walked.append(max(map(len, rows)))
        return run(rows, *args, **kwargs)

    monkeypatch.setattr(sys.modules["shardstage.simulator.simulate"], "run", counting)
    assert step_time(pipeline("1f1b", 64, 512), prices(64)) == (512 + 63) * 3
    assert walked and max(walked) < 6 * 80


def test_spans_of_a_stream_do_not_overlap() -> None:
    table = prices(8, latency_s=0.2, bytes_per_s=2 * MESSAGE_BYTES)
    timeline = simulate(pipeline("interleaved-1f1b", 4, 8, stages_per_rank=2, dp=2), table)
    for rank in timeline.ranks:
        for stream in ("compute", "dp", "pp"):
            spans = timeline.spans_of(rank, stream)  # type: ignore[arg-type]
            assert all(a.end_s <= b.start_s for a, b in pairwise(spans))


def test_a_program_that_cannot_end_is_refused() -> None:
    program = pipeline("1f1b", 2, 2)
    assert step_time(program, prices(2)) > 0
    with pytest.raises(ProgramError, match="rank 0 waits in 0RECV_B0<1 for ever"):
        step_time(_without_sends(program), prices(2))


def _without_sends(program: Program) -> Program:
    rows = [
        replace(row, instructions=tuple(i for i in row.instructions if i.kind != "SEND_F"))
        for row in program.rows
    ]
    return replace(program, rows=tuple(rows))
