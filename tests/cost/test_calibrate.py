"""Factors from runs: known ones are found again, a run moves what it can tell, and the interval is honest."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.cost.calibrated_runs import TRUE, observed, parts, random_runs
from tests.cost.machines import round_machine

from shardstage.cluster import CAUSES, Calibration, Cluster
from shardstage.cost.calibrate import Observation, calibrate, predicted_by_others
from shardstage.errors import ClusterError

MACHINE = round_machine()


def fitted(runs: list[Observation], kind: str = "cuda") -> Calibration:
    return calibrate(runs, round_machine(kind=kind), date="2026-01-31")


def miss(calibration: Calibration, runs: list[Observation]) -> float:
    return sum(abs(math.log(calibration.seconds(r.parts) / r.measured_s)) for r in runs) / len(runs)


def test_runs_of_all_kinds_give_the_true_factors_back() -> None:
    found = fitted(random_runs(60, noise=0.02))
    assert found.factors == pytest.approx(TRUE, rel=0.06)
    for cause, factor in TRUE.items():
        low, high = found.interval(cause)
        assert low < found.factors[cause] < high and high / low < 1.2, (cause, factor)


def test_intervals_of_factors_hold_the_true_ones_about_as_often_as_they_say() -> None:
    """Of clusters that differ as much as the built-in spread says, and a step of which has half of its variance of its own."""
    held, draws = 0, random.Random(0)
    for seed in range(16):
        true = {cause: math.exp(draws.gauss(0.0, 0.087)) for cause in CAUSES}
        found = fitted(random_runs(12, noise=0.06, true=true, seed=seed))
        held += sum(low <= true[c] <= high for c, (low, high) in ((c, found.interval(c)) for c in CAUSES))
    assert 0.68 <= held / (16 * len(CAUSES)) <= 0.92  # 80 % of 96: a standard deviation of 4 %, three of them


def test_more_runs_predict_runs_not_seen_better() -> None:
    fresh = random_runs(40, seed=99)
    by_formulas = sum(abs(math.log(r.modelled_s / r.measured_s)) for r in fresh) / len(fresh)
    errors = [miss(fitted(random_runs(count, noise=0.02)), fresh) for count in (2, 6, 30)]
    assert by_formulas > errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.02


def test_one_run_moves_only_what_it_has() -> None:
    found = fitted([observed(parts(products=0.9, memory=0.1), 1.4)])
    factors = found.factors
    assert 1.1 < factors["products"] < 1.4
    assert 1 < factors["memory"] < 1.1
    assert [factors[cause] for cause in ("host", "tp", "dp", "pp")] == [1.0] * 4
    low, high = found.interval("tp")
    assert low == pytest.approx(1 / high) and high > 1.1, "nothing is known of it, and machines differ"


def test_a_run_moves_factors_less_where_predictions_spread_more() -> None:
    run = parts(products=1.0)
    gpu = fitted([observed(run, 1.3)]).factors["products"]
    cpu = fitted([observed(run, 1.3, kind="cpu")], "cpu").factors["products"]
    assert 1 < cpu < gpu < 1.3


def test_a_run_half_as_long_and_one_twice_as_long_move_a_factor_equally_far() -> None:
    quick, slow = (
        fitted([observed(parts(products=1.0), ratio)]).factors["products"] for ratio in (0.6, 1 / 0.6)
    )
    assert quick * slow == pytest.approx(1.0)


def test_factors_stay_within_a_half_and_two_until_there_are_many_runs() -> None:
    few = fitted([observed(parts(products=1.0 + n), 5.0) for n in range(3)])
    many = fitted([observed(parts(products=1.0 + n), 5.0) for n in range(12)])
    assert few.factors["products"] == pytest.approx(2.0)
    assert many.factors["products"] == pytest.approx(5.0, rel=0.1)
    assert few.spread > 0.5 > many.spread


def test_runs_without_error_leave_the_factors_at_one() -> None:
    found = fitted(random_runs(5, true=dict.fromkeys(CAUSES, 1.0)))
    assert found.factors == pytest.approx(dict.fromkeys(CAUSES, 1.0), abs=1e-6)


def test_the_interval_narrows_as_runs_agree_and_holds_most_of_those_not_seen() -> None:
    spreads = [fitted(random_runs(count, noise=0.05)).spread for count in (1, 40)]
    assert spreads[0] > spreads[1]
    found = fitted(random_runs(40, noise=0.05))
    fresh = random_runs(200, noise=0.05, seed=5)
    ranges = [(r.measured_s, found.range_s(r.parts)) for r in fresh]
    held = sum(low <= measured_s <= high for measured_s, (low, _, high) in ranges)
    assert 0.72 <= held / len(fresh) <= 0.95


def test_a_step_of_causes_that_no_run_had_is_less_certain() -> None:
    found = fitted([observed(parts(products=1.0 + n, memory=0.5), 1.2) for n in range(8)])
    like, unlike = parts(products=3.0, memory=0.5), parts(products=2.0, tp=1.5)
    widths = [high / low for low, _, high in map(found.range_s, (like, unlike))]
    assert widths[1] > 1.05 * widths[0]


def test_a_run_is_predicted_by_runs_of_other_parts_only() -> None:
    same = parts(products=1.0)
    twice = [observed(same, 1.5, name="a"), observed(same, 1.5, name="b")]
    assert predicted_by_others(twice, MACHINE) == (1.0, 1.0)
    third = observed(parts(products=2.0), 1.5, name="c")
    by_others = predicted_by_others([*twice, third], MACHINE)
    assert 1.3 < by_others[0] < 1.5 and 2.6 < by_others[2] < 3.0


@settings(max_examples=12, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.floats(0, 10), min_size=6, max_size=6), st.floats(0.05, 20)),
        min_size=1,
        max_size=13,
    )
)
def test_any_runs_give_factors_above_zero_and_an_interval_around_the_expected(
    drawn: list[tuple[list[float], float]],
) -> None:
    runs = [
        observed(dict(zip(CAUSES, [seconds[0] + 0.01, *seconds[1:]], strict=True)), ratio)
        for seconds, ratio in drawn
    ]
    found = fitted(runs)
    assert all(factor > 0 for factor in found.factors.values())
    for run in runs:
        low, expected, high = found.range_s(run.parts)
        assert 0 < low < expected < high < math.inf
    assert found == fitted(runs), "the same runs give the same factors"


def test_no_run_is_refused() -> None:
    with pytest.raises(ClusterError, match="no run to calibrate from") as caught:
        calibrate([], MACHINE, date="2026-01-31")
    assert caught.value.hint == "shardstage calibrate runs/*"


def test_a_run_on_another_kind_of_device_is_refused() -> None:
    with pytest.raises(
        ClusterError, match=r"the run laptop was on cpu, and cluster 'round' has .* cuda"
    ) as caught:
        fitted([observed(parts(products=1.0), 1.0, name="laptop", kind="cpu")])
    assert "leave out laptop" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("seconds", "ratio"), [(parts(), 1.0), (parts(products=1.0), 0.0), (parts(products=1.0, pp=-0.1), 1.0)]
)
def test_a_run_without_time_is_refused(seconds: dict[str, float], ratio: float) -> None:
    with pytest.raises(ClusterError, match="must be above zero"):
        fitted([observed(seconds, ratio)])


def test_devices_of_two_kinds_are_refused_with_what_to_do_instead() -> None:
    parts = (round_machine(), round_machine(kind="cpu"))
    both = Cluster.of_parts(parts, name="both", network=parts[0].levels[-1])
    with pytest.raises(ClusterError, match="one set of factors is no correction for both") as caught:
        calibrate(random_runs(2), both, date="2026-01-01")
    assert "--cluster round:8 --out first.toml" in str(caught.value.hint)
