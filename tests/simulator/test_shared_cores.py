"""Ranks that share cores: who waits leaves them to the others, as on a laptop whose four ranks run on two of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from tests.cost.machines import round_machine
from tests.simulator.planned_cases import CLUSTER, GRAPH, Planned, analytic, planned
from tests.simulator.programs import pipeline, prices

from shardstage.cluster import Cluster
from shardstage.cluster.links import LinearCost
from shardstage.cost.step import CALIBRATIONS
from shardstage.planner import predict
from shardstage.simulator import parse_change, simulate, step_time, what_if
from shardstage.simulator.acts import ALONE, COMPUTE, RECEIVE, SEND, Act, Departure
from shardstage.simulator.run import run


def shared(ratio: float, message: LinearCost | None = None) -> Cluster:
    """Eight ranks that are ``ratio`` times quicker alone than all at a time."""
    return replace(CLUSTER, device=replace(CLUSTER.device, alone_ratio=ratio, message=message))


def computes(*seconds: float) -> list[Act]:
    return [(COMPUTE, each, 0.0, 0.0, ALONE, None) for each in seconds]


def ends_s(rows: Sequence[Sequence[Act]], num_cores: float, ranks: Sequence[int] = ()) -> list[list[float]]:
    return run(rows, {}, num_cores=num_cores, ranks_of_rows=ranks).ends_s


def simulated_s(case: Planned) -> float:
    return step_time(case.program, case.prices)


def test_two_ranks_on_a_core_and_a_half_are_served_alike_until_one_is_done() -> None:
    """Both at three quarters of a core for two seconds; the other half of the longer then has a core of its own."""
    assert ends_s([computes(3.0), computes(1.5)], 1.5) == [[3.5], [2.0]]


def test_a_core_that_one_leaves_is_the_other_s_at_once() -> None:
    """The second waits for nothing between its two, the first is done after the first of them: 1 / 0.75, then 0.5 + 1 alone."""
    assert ends_s([computes(1.0), computes(1.5, 1.0)], 1.5) == [
        [pytest.approx(4 / 3)],
        [pytest.approx(4 / 3 + 0.5), pytest.approx(4 / 3 + 1.5)],
    ]


def test_a_lane_takes_as_much_of_the_cores_as_the_ranks_that_it_stands_for() -> None:
    """Three ranks at half a core each for three seconds, then two at three quarters."""
    assert ends_s([computes(3.0), computes(1.5)], 1.5, [2, 1]) == [[5.0], [3.0]]
    assert ends_s([computes(3.0), computes(3.0), computes(1.5)], 1.5) == [[5.0], [5.0], [3.0]]


@pytest.mark.parametrize("num_cores", [1.0, 2.5, 5.0])
def test_alike_ranks_take_what_they_would_one_by_one(num_cores: float) -> None:
    program = pipeline("1f1b", 3, 6, dp=4)
    table = prices(3, num_cores=num_cores, message_s=0.1, latency_s=0.05)
    apart = replace(table, special_ranks=tuple(range(12)))
    assert len(simulate(program, table).ranks) == 3 and len(simulate(program, apart).ranks) == 12
    assert step_time(program, table) == pytest.approx(step_time(program, apart), rel=1e-9)


def test_both_ends_of_a_message_work_for_it_on_the_cores() -> None:
    """A computation and a send on a core and a half: two thirds of a second for half a second of each. It is a second on its way,
    and then what is left of the computation shares the cores with the receiver, who is done first."""
    rows: list[list[Act]] = [
        [(SEND, 0.0, 1.0, 0.0, 7, Departure(1, 0.5))],
        [(RECEIVE, 0.0, 0.0, 0.0, 7, 0.5)],
        computes(2.0),
    ]
    sent_s, received_s, computed_s = (ends[0] for ends in ends_s(rows, 1.5))
    assert sent_s == pytest.approx(2 / 3)
    assert received_s == pytest.approx(2 / 3 + 1 + 2 / 3)
    assert computed_s == pytest.approx(2 / 3 + 1 + 2 / 3), (
        "0.5 beside the send, 1 alone, 0.5 beside the receive"
    )
    alone = run(rows, {}).ends_s
    assert [row[0] for row in alone] == [0.5, 2.0, 2.0], "where each has its device"


def test_ranks_that_share_cores_take_the_time_of_their_work() -> None:
    program = pipeline("1f1b", 4, 16)
    assert step_time(program, prices(4, num_cores=4)) == step_time(program, prices(4))
    assert step_time(program, prices(4, num_cores=1)) == pytest.approx(4 * 16 * 3)
    messages_s = 16 * 3 * 2 * 2 * 0.25
    assert step_time(program, prices(4, num_cores=1, message_s=0.25)) == pytest.approx(
        4 * 16 * 3 + messages_s
    )
    shared = step_time(program, prices(4, num_cores=2))
    assert 4 * 16 * 3 / 2 < shared < 4 * 16 * 3 / 2 * 1.1


def test_a_slow_device_gets_the_cores_of_those_that_wait_for_it() -> None:
    """Four ranks on two cores: all at half a core for what three of them have to do, then the slow one alone for as much again."""
    program = pipeline("gpipe", 1, 1, dp=4)
    found = what_if(program, prices(1, num_cores=2), parse_change("slow=0:2"))
    assert (found.before_s, found.after_s) == (6.0, 9.0)


@pytest.mark.parametrize(
    "text", ["dp=4,mb=2", "dp=4,mb=2,zero=1", "dp=2,tp=2,mb=8", "dp=4,mb=8,zero=3", "tp=4,mb=8"]
)
@pytest.mark.parametrize("ratio", [1.9, 4.0])
def test_without_stages_all_compute_at_a_time_at_the_pace_that_was_measured(text: str, ratio: float) -> None:
    apart, together = planned(text), planned(text, cluster=shared(ratio, LinearCost(1e-3, 1e9)))
    assert simulated_s(together) == pytest.approx(simulated_s(apart), rel=1e-9)
    assert together.prices.num_cores == 4 / ratio and apart.prices.num_cores is None


def test_a_rank_alone_is_quicker_and_its_update_is_not() -> None:
    apart, together = planned("pp=4,mb=2").prices, planned("pp=4,mb=2", cluster=shared(2.0)).prices
    for kind in ("F", "B", "I", "W"):
        assert together.compute_s(0, 0, kind, 2) == pytest.approx(apart.compute_s(0, 0, kind, 2) / 2)
    assert together.own_s(0, "STEP", None, 0) == apart.own_s(0, "STEP", None, 0)
    assert together.transfer(1000, 0, 1).core_s == 0.0, "nothing is known of messages"


def test_messages_take_of_shared_cores_alone() -> None:
    """``message`` is what they take while all ranks are busy; whoever has a device of his own has a link of his own."""
    message = LinearCost(1e-3, 1e6)
    assert planned("pp=4,mb=2", cluster=shared(2.0, message)).prices.transfer(1000, 0, 1).core_s == 1e-3
    assert planned("pp=4,mb=2", cluster=shared(1.0, message)).prices.transfer(1000, 0, 1).core_s == 0.0


def test_a_message_slows_nothing_down_but_by_the_cores_that_it_takes() -> None:
    """Where nothing is known of cores, a CPU's messages and computations take turns."""
    apart = round_machine(4, kind="cpu")
    together = replace(apart, device=replace(apart.device, alone_ratio=2.0))
    assert planned("pp=4,mb=2", cluster=apart).prices.slowdown == 2.0
    assert planned("pp=4,mb=2", cluster=together).prices.slowdown == 1.0


@pytest.mark.parametrize(
    ("message", "wire"),
    [
        (None, (3e-3, 1e-3, 1.0, 0.0)),
        (LinearCost(1e-3, 1e30), (2e-3, 1e-3, 1.0, 0.5e-3)),
        (LinearCost(3.5e-3, 1e30), (0.0, 0.5e-3, 1.0, 1.75e-3)),
        (LinearCost(9e-3, 1e30), (0.0, 0.0, 1.0, 4.5e-3)),
    ],
)
def test_of_a_measured_message_both_ends_work_is_a_part(
    message: LinearCost | None, wire: tuple[float, ...]
) -> None:
    """The probe's go there and back: 3 ms and 1 ms for these bytes from one send to the other end's receive."""
    cluster = shared(2.0, message)
    far = tuple(replace(level, latency_s=3e-3, bytes_per_s=1e6) for level in cluster.levels)
    found = planned("pp=4,mb=2", cluster=replace(cluster, levels=far)).prices.transfer(1000, 0, 1)
    assert found == pytest.approx(wire)


@pytest.mark.parametrize("message", [None, LinearCost(2e-4, 1e10)])
@pytest.mark.parametrize(
    "text",
    [
        "pp=4,mb=2",
        "pp=4,mb=2,schedule=gpipe",
        "pp=4,mb=2,schedule=zb-h1",
        "pp=4,mb=2,schedule=interleaved-1f1b",
        "pp=4,mb=2,schedule=zb-v",
        "pp=4,mb=2,recompute=full",
        "dp=2,pp=2,mb=2",
        "tp=2,pp=2,mb=2",
    ],
)
def test_a_pipeline_on_shared_cores_takes_what_the_formula_says(
    text: str, message: LinearCost | None
) -> None:
    """It took almost twice as long, as if a rank whose neighbours wait were no quicker: plans of several stages came last."""
    cluster = shared(2.0, message)
    case, apart = planned(text, cluster=cluster), planned(text)
    assert simulated_s(case) == pytest.approx(analytic(case.plan, cluster)[1], rel=0.05)
    assert simulated_s(case) < simulated_s(apart) or message


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "zb-h1"])
@pytest.mark.parametrize("text", ["tp=2,pp=2,mb=32", "dp=2,pp=2,mb=16,zero=3"])
@pytest.mark.parametrize("ratio", [2.2, 3.0])
def test_ranks_of_a_stage_compute_at_a_time_and_nobody_does_while_they_talk(
    text: str, schedule: str, ratio: float
) -> None:
    """A single microbatch on less than a core for each stage's ranks. One rank alone was priced, as if the others of its stage waited,
    and weight gradients as if they had cores of their own: up to 17 % too fast."""
    cluster = shared(ratio)
    case = planned(f"{text},schedule={schedule}", cluster=cluster)
    found_s = predict(GRAPH, case.plan, cluster).step_time_s / CALIBRATIONS["cuda"].expected
    assert found_s == pytest.approx(simulated_s(case), rel=0.01)


def test_devices_of_several_classes_share_nothing() -> None:
    """Whose cores they were nobody measured; each computes at the pace of all ranks busy."""
    part = replace(shared(2.0).with_devices(2), name="part")
    other = replace(part, device=replace(part.device, name="other", bytes_per_s=2e9))
    mixed = Cluster.of_parts((part, other), name="mixed", network=part.levels[-1])
    apart = Cluster.of_parts(
        tuple(replace(each, device=replace(each.device, alone_ratio=1.0)) for each in (part, other)),
        name="mixed",
        network=part.levels[-1],
    )
    assert simulated_s(planned("pp=4,mb=2", cluster=mixed)) == simulated_s(
        planned("pp=4,mb=2", cluster=apart)
    )
