"""Ranks on devices of several classes: each computes as fast as its own device, which the plan's prices knew and the simulation did not."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.cost.machines import round_machine
from tests.simulator.planned_cases import GRAPH, Planned, planned

from shardstage.cluster import Cluster
from shardstage.planner import predict
from shardstage.simulator import simulate, step_time


def mixed(speed: float, *, fast_first: bool = False) -> Cluster:
    """Two devices, and two that are so many times as fast."""
    slow = round_machine(2, latency_s=1e-6)
    rates = {dtype: speed * rate for dtype, rate in slow.device.flops_per_s.items()}
    device = replace(slow.device, name="fast", bytes_per_s=speed * 1e9, flops_per_s=rates)
    parts = (slow, replace(slow, name="fast", device=device))
    return Cluster.of_parts(parts[::-1] if fast_first else parts, name="mixed", network=slow.levels[-1])


def simulated_s(case: Planned) -> float:
    return step_time(case.program, case.prices)


@pytest.mark.parametrize(
    "text", ["pp=4,mb=2", "pp=2,tp=2,mb=2", "pp=4,mb=2,recompute=full", "dp=4,mb=2", "dp=4,mb=8,zero=3"]
)
@pytest.mark.parametrize("speed", [1.0, 3.0])
def test_a_step_over_two_classes_takes_what_the_formula_says(text: str, speed: float) -> None:
    case = planned(text, cluster=mixed(speed))
    assert simulated_s(case) == pytest.approx(predict(GRAPH, case.plan, mixed(speed)).step_time_s, rel=0.08)


def test_each_stage_runs_at_the_speed_of_its_own_device() -> None:
    case = planned("pp=4,mb=2", cluster=mixed(2.0))
    slow, fast = (case.prices.compute_s(rank, 1, "F", 2) for rank in (0, 3))
    assert slow == pytest.approx(2 * fast)


def test_the_slower_pipelines_are_simulated_whichever_part_comes_first() -> None:
    """Ranks with the same acts on unlike devices are no likes of each other."""
    for fast_first in (False, True):
        case = planned("dp=4,mb=2", cluster=mixed(3.0, fast_first=fast_first))
        timeline = simulate(case.program, case.prices, case.prices.holdings)
        assert timeline.alike == {0: (0, 1), 2: (2, 3)}
        busy = [timeline.busy_s(rank) for rank in (0, 2)]
        assert max(busy) > 2 * min(busy) and (busy[0] < busy[1]) is fast_first
    assert simulated_s(planned("dp=4,mb=2", cluster=mixed(3.0))) == pytest.approx(simulated_s(case), rel=0.01)
