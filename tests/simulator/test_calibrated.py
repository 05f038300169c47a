"""A calibrated cluster: the simulation multiplies each duration by the factor of its cause, as the step formula does its parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
from tests.cluster.test_calibration import FOUND
from tests.cost.machines import round_machine
from tests.simulator.planned_cases import Planned, analytic, planned

from shardstage.cluster import CAUSES, Cluster, load
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


@pytest.mark.parametrize("axis", ["tp", "dp", "world", "tie0+3"])
def test_a_collective_has_the_factor_of_its_axis(axis: str) -> None:
    call, group = Collective(axis, "all_reduce", "float32", 1000), (0, 1, 2, 3)
    own = "tp" if axis == "tp" else "dp"
    plain = planned("pp=4,mb=2", cluster=PLAIN).prices.collective(call, group)
    for cause in CAUSES:
        factor = 2.0 if cause == own else 1.0
        assert on("pp=4,mb=2", {cause: 2.0}).prices.collective(call, group) == plain.times(factor)


def test_a_message_has_the_pipeline_s_factor_and_the_update_the_memory_s() -> None:
    plain = planned("pp=2,dp=2,mb=2,zero=1", cluster=PLAIN).prices
    for cause in CAUSES:
        prices = on("pp=2,dp=2,mb=2,zero=1", {cause: 2.0}).prices
        assert prices.transfer(1000, 0, 2) == plain.transfer(1000, 0, 2).times(2.0 if cause == "pp" else 1.0)
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
