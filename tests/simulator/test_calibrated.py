"""A calibrated cluster: the simulation multiplies each duration by the factor of its cause, as the step formula does its parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

import pytest
from tests.cluster.test_calibration import FOUND
from tests.cost.machines import round_machine
from tests.simulator.planned_cases import Planned, analytic, planned

from shardstage.cluster import CAUSES, Cluster, load
from shardstage.cluster.links import LinearCost
from shardstage.program import Collective
from shardstage.simulator import parse_change, simulate, step_time, what_if

PLAIN = round_machine(8, latency_s=1e-6, op_latency_s=1e-6)
TEXTS = (
    "pp=4,mb=2",
    "pp=4,mb=2,schedule=zb-h1",
    "pp=2,tp=2,mb=2,recompute=selective",
    "tp=2,dp=2,mb=2,sp",
    "pp=2,dp=2,mb=2,zero=1",
    "dp=4,mb=2,zero=3,recompute=full",
    "pp=2,dp=2,mb=2,zero=2,offload=optimizer",
)


def calibrated(factors: Mapping[str, float], cluster: Cluster = PLAIN) -> Cluster:
    return replace(cluster, calibration=replace(FOUND, factors=dict.fromkeys(CAUSES, 1.0) | dict(factors)))


def on(text: str, factors: Mapping[str, float], num_ranks: int = 4) -> Planned:
    return planned(text, num_ranks=num_ranks, cluster=calibrated(factors))


def kernels_s(case: Planned) -> tuple[float, ...]:
    return tuple(case.prices.compute_s(0, 0, kind, 2) for kind in ("F", "B", "I", "W"))


@pytest.mark.parametrize("text", TEXTS)
def test_factors_of_one_change_nothing(text: str) -> None:
    plain, same = planned(text, cluster=PLAIN), on(text, {})
    assert simulate(same.program, same.prices) == simulate(plain.program, plain.prices)


@pytest.mark.parametrize("text", TEXTS)
def test_factors_of_two_double_the_step_whatever_overlaps(text: str) -> None:
    plain, double = planned(text, cluster=PLAIN), on(text, dict.fromkeys(CAUSES, 2.0))
    assert step_time(double.program, double.prices) == 2 * step_time(plain.program, plain.prices)


@pytest.mark.parametrize("preset", ["a100-80:8", "cpu:8"])
def test_they_do_on_other_devices(preset: str) -> None:
    """With a model of kernels a launch is in its kernel's own time, with a curve it is the host's."""
    cluster = load(preset)
    found = replace(FOUND, factors=dict.fromkeys(CAUSES, 2.0), device_kind=cluster.device.kind)
    plain, double = (
        planned("pp=2,dp=2,mb=2", cluster=each) for each in (cluster, replace(cluster, calibration=found))
    )
    assert step_time(double.program, double.prices) == 2 * step_time(plain.program, plain.prices)


@pytest.mark.parametrize("text", ["mb=32", "mb=8", "mb=8,offload=optimizer"])
@pytest.mark.parametrize("cause", CAUSES)
def test_on_one_rank_each_factor_alone_moves_the_step_as_the_formula_says(text: str, cause: str) -> None:
    """Nothing overlaps, so that the seconds of a cause are the formula's part."""
    parts = analytic(planned(text, num_ranks=1, cluster=PLAIN).plan, PLAIN)[0].parts
    plain, found = (on(text, factors, num_ranks=1) for factors in ({}, {cause: 3.0}))
    more_s = step_time(found.program, found.prices) - step_time(plain.program, plain.prices)
    assert more_s == pytest.approx(2 * parts[cause], rel=1e-6, abs=1e-9)
    assert parts["products"] * parts["memory"] * parts["host"] > 0, "all of it is tried"


@pytest.mark.parametrize("causes", [("memory",), ("products", "host")])
def test_so_does_what_is_computed_again(causes: tuple[str, ...]) -> None:
    """The formula tells launches of recomputed kernels from their products by the forward's proportion, the simulation one by one."""
    text = "mb=8,recompute=full"
    parts = analytic(planned(text, num_ranks=1, cluster=PLAIN).plan, PLAIN)[0].parts
    plain, found = (on(text, factors, num_ranks=1) for factors in ({}, dict.fromkeys(causes, 3.0)))
    more_s = step_time(found.program, found.prices) - step_time(plain.program, plain.prices)
    assert more_s == pytest.approx(2 * sum(parts[cause] for cause in causes), rel=1e-6)


def test_tensor_parallel_ranks_wait_by_tp_alone() -> None:
    parts = analytic(planned("tp=4,mb=8", cluster=PLAIN).plan, PLAIN)[0].parts
    plain, found = on("tp=4,mb=8", {}), on("tp=4,mb=8", {"tp": 3.0})
    more_s = step_time(found.program, found.prices) - step_time(plain.program, plain.prices)
    assert more_s == pytest.approx(2 * parts["tp"], rel=1e-3)
    assert kernels_s(found) == kernels_s(plain)


@pytest.mark.parametrize(
    "factors",
    [
        {"products": 2.0, "memory": 2.0, "host": 2.0},
        {"products": 1.3, "memory": 0.7, "host": 1.9, "tp": 2.5},
    ],
)
@pytest.mark.parametrize("text", ["tp=4,mb=2", "mb=8,recompute=full"])
def test_a_calibrated_step_is_the_formula_s(text: str, factors: dict[str, float]) -> None:
    num_ranks = 4 if "tp" in text else 1
    found = on(text, factors, num_ranks=num_ranks)
    expected_s = analytic(found.plan, calibrated(factors))[0].step_time_s
    assert step_time(found.program, found.prices) == pytest.approx(expected_s, rel=1e-4)


def test_a_calibrated_pipeline_is_the_formula_s_where_its_bubble_has_the_factor_of_its_compute() -> None:
    even = dict.fromkeys(("products", "memory", "host", "pp"), 1.4)
    found = on("pp=4,mb=2", even)
    assert step_time(found.program, found.prices) == pytest.approx(
        analytic(found.plan, calibrated(even))[0].step_time_s, rel=1e-4
    )


OVERLAPPING = ("dp=4,mb=8", "dp=4,mb=2,zero=1", "dp=4,mb=2,zero=3,recompute=full")


@pytest.mark.parametrize("text", OVERLAPPING)
@pytest.mark.parametrize(
    "factors", [{"dp": 3.0}, {"dp": 0.4}, {"memory": 1.6}, {"products": 1.8, "memory": 0.6, "dp": 1.7}]
)
def test_of_collectives_beside_compute_what_does_not_hide_is_weighed(
    text: str, factors: dict[str, float]
) -> None:
    """The factors were fitted to that. Were collectives three times as long as a whole, far more than three times as much would show."""
    plain, found = on(text, {}), on(text, factors)
    parts = analytic(plain.plan, PLAIN)[0].parts
    more_s = step_time(found.program, found.prices) - step_time(plain.program, plain.prices)
    expected_s = sum((factor - 1) * parts[cause] for cause, factor in factors.items())
    assert more_s == pytest.approx(expected_s, rel=0.05), parts


@pytest.mark.parametrize("text", [*OVERLAPPING, "pp=2,dp=2,mb=2,zero=2", "dp=4,mb=2,zero=2"])
def test_the_step_follows_the_factor_of_dp_in_a_straight_line(text: str) -> None:
    """As far as one rank's step goes; with others' waiting between them it still grows with it."""
    seconds = [
        step_time(case.program, case.prices) for case in (on(text, {"dp": f}) for f in (0.5, 1.0, 3.0))
    ]
    less_s, more_s = seconds[1] - seconds[0], seconds[2] - seconds[1]
    assert more_s == pytest.approx(4 * less_s, rel=1e-6) and less_s > 0


def test_spans_of_weighed_collectives_end_with_the_step_s_own_and_keep_their_order() -> None:
    found = on("dp=4,mb=8", {"dp": 3.0, "memory": 0.5})
    timeline = simulate(found.program, found.prices)
    spans = [span for span in timeline.spans_of(0) if span.stream == "dp"]
    assert timeline.step_time_s == pytest.approx(step_time(found.program, found.prices))
    assert all(a.end_s <= b.start_s for a, b in pairwise(spans)) and len(spans) > 1


@pytest.mark.parametrize("axis", ["tp", "dp", "world", "tie0+3"])
def test_a_collective_has_the_factor_of_its_axis(axis: str) -> None:
    call, group = Collective(axis, "all_reduce", "float32", 1000), (0, 1, 2, 3)
    own = "tp" if axis == "tp" else "dp"
    plain = planned("pp=4,mb=2", cluster=PLAIN).prices.collective(call, group)
    for cause in CAUSES:
        found = on("pp=4,mb=2", {cause: 2.0}).prices.collective(call, group)
        assert found == plain._replace(factor=2.0 if cause == own else 1.0)
        assert found.seconds == found.factor * plain.seconds and found.formula_s == plain.seconds


def test_a_message_has_the_pipeline_s_factor_and_the_update_the_memory_s() -> None:
    device = replace(PLAIN.device, alone_ratio=1.5, message=LinearCost(1e-4, 1e9))
    shared = replace(PLAIN, device=device)
    plain = planned("pp=2,dp=2,mb=2,zero=1", cluster=shared).prices
    for cause in CAUSES:
        prices = planned("pp=2,dp=2,mb=2,zero=1", cluster=calibrated({cause: 2.0}, shared)).prices
        factor, wire = 2.0 if cause == "pp" else 1.0, plain.transfer(1000, 0, 2)
        weighed = (factor * wire.latency_s, factor * wire.bytes_s, 1.0, factor * wire.core_s)
        assert prices.transfer(1000, 0, 2) == weighed and wire.core_s > 0
        update_s = (2.0 if cause == "memory" else 1.0) * plain.own_s(0, "STEP", None, 0)
        assert prices.own_s(0, "STEP", None, 0) == update_s > 0


def test_a_what_if_asks_the_calibrated_machine() -> None:
    found = on("pp=4,mb=2", {"pp": 2.0, "memory": 3.0})
    answer = what_if(found.program, found.prices, parse_change("slow=1:1.5"))
    assert answer.before_s == step_time(found.program, found.prices) < answer.after_s


def test_of_several_classes_it_is_the_first_one_s_as_the_device_is() -> None:
    both = Cluster.of_parts((calibrated({"tp": 2.0}), PLAIN), name="both", network=PLAIN.levels[-1])
    assert both.factors == calibrated({"tp": 2.0}).factors
    assert set(PLAIN.factors.values()) == {1.0}
