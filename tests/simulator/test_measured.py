"""A run of one schedule as prices of another: what a simulated machine "measures" comes back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
from tests.simulator.programs import pipeline

from shardstage.errors import ProgramError
from shardstage.program import Program
from shardstage.simulator import PriceTable, measured_prices, step_time
from shardstage.simulator.acts import Pricer
from shardstage.simulator.lanes import lanes_of
from shardstage.simulator.run import run
from shardstage.timeline import Span, Timeline


def measured(program: Program, prices: PriceTable) -> Timeline:
    """The timeline that an engine would record on a machine with these prices: one span for every instruction."""
    lanes = lanes_of(program)
    pricer = Pricer(program, lanes, prices)
    rows = [pricer.acts_of(lane, lane.instructions) for lane in lanes.lanes]
    ran = run(rows, pricer.group_sizes, num_cores=prices.num_cores)

    def spans() -> Iterator[Span]:
        for lane, starts, ends in zip(lanes.lanes, ran.starts_s, ran.ends_s, strict=True):
            for i, start_s, end_s in zip(lane.instructions, starts, ends, strict=True):
                stream = "pp" if i.is_send or i.is_receive else "compute"
                yield Span(lane.rank, stream, i.name, start_s, end_s)  # type: ignore[arg-type]

    return Timeline(source="measured", spans=tuple(spans()))


def machine(num_stages: int, seed: int, **changed: object) -> PriceTable:
    drawn = random.Random(seed)
    compute: dict[tuple[int, str], float] = {}
    for stage in range(num_stages):
        for kind in "FIW":
            compute[stage, kind] = drawn.uniform(1, 2)
        compute[stage, "B"] = compute[stage, "I"] + compute[stage, "W"]
    own = {"SEND_F": 0.02, "SEND_B": 0.03, "RECV_F": 0.01, "RECV_B": 0.01, "STEP": 0.5}
    return replace(PriceTable(compute=compute, latency_s=0.1, own=own), **changed)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_cores", [None, 2])
def test_one_schedule_predicts_the_others(num_cores: int | None) -> None:
    """ZB-H1 runs all four kinds. On shared cores a computation's own seconds are found back from who else computed."""
    truth = machine(4, seed=1, num_cores=num_cores)
    reference = pipeline("zb-h1", 4, 12)
    prices = measured_prices([measured(reference, truth)], reference, num_cores=num_cores)
    for stage in range(4):
        for kind in ("F", "I", "W", "B"):
            assert prices.compute_s(0, stage, kind, 1) == pytest.approx(truth.compute[stage, kind], rel=1e-6)
    for name in ("1f1b", "gpipe", "zb-h1"):
        program = pipeline(name, 4, 12)
        assert step_time(program, prices) == pytest.approx(step_time(program, truth), rel=0.005)


def test_medians_forget_a_step_that_was_disturbed() -> None:
    program, truth = pipeline("1f1b", 2, 6), machine(2, seed=2)
    steps = [measured(program, truth)] * 4
    slow = measured(program, replace(truth, compute={key: 5 * s for key, s in truth.compute.items()}))
    assert step_time(program, measured_prices([*steps, slow], program)) == pytest.approx(
        step_time(program, truth), rel=0.005
    )


def test_a_kind_that_was_not_measured_is_refused() -> None:
    program = pipeline("1f1b", 2, 4)
    prices = measured_prices([measured(program, machine(2, seed=3))], program)
    with pytest.raises(ProgramError, match="no I of stage 0 was measured"):
        step_time(pipeline("zb-h1", 2, 4), prices)
    assert prices.compute_s(0, 1, "F", 3) == pytest.approx(3 * prices.compute_s(0, 1, "F", 1))


def test_a_timeline_of_another_program_is_refused() -> None:
    found = measured(pipeline("1f1b", 2, 4), machine(2, seed=4))
    with pytest.raises(ProgramError, match="was not measured in 0F4"):
        measured_prices([found], pipeline("1f1b", 2, 5))
