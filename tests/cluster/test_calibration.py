"""``Calibration``: seconds and their range from factors, and its table in a cluster file."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from tests.cost.machines import round_machine

from shardstage.cluster import CAUSES, Calibration, Cluster
from shardstage.cluster.calibration import TENTH_PERCENTILE
from shardstage.errors import ClusterError

FACTORS = {"products": 1.25, "memory": 0.8, "host": 1.0, "tp": 2.0, "dp": 1.0, "pp": 1.0}
IDENTITY = tuple(tuple(0.04 * (row == column) for column in range(6)) for row in range(6))
FOUND = Calibration(
    factors=FACTORS,
    covariance=IDENTITY,
    known_variance=0.03,
    spread=0.1,
    num_runs=3,
    device_kind="cuda",
    cluster="round",
    date="2026-01-31",
)


def test_seconds_are_those_of_the_causes_by_their_factors() -> None:
    assert FOUND.seconds({"products": 4.0, "memory": 1.0, "tp": 0.5}) == pytest.approx(5.0 + 0.8 + 1.0)


def test_the_range_widens_by_what_is_not_known_of_the_causes() -> None:
    low, expected, high = FOUND.range_s(
        {"products": 8.0}
    )  # one cause: 0.04 of variance, of which 0.03 is in the spread
    reach = math.exp(TENTH_PERCENTILE * math.sqrt(0.1**2 + 0.01))
    assert (low, expected, high) == pytest.approx((10 / reach, 10.0, 10 * reach))
    even = dict.fromkeys(CAUSES, 1.0)  # errors of six causes partly cancel: less than the runs' own
    low, expected, high = FOUND.range_s(even)
    assert math.log(high / expected) == pytest.approx(TENTH_PERCENTILE * 0.1)


def test_the_interval_of_a_factor_is_that_of_its_variance() -> None:
    low, high = FOUND.interval("tp")
    assert low * high == pytest.approx(4.0)
    assert math.log(high / 2.0) == pytest.approx(TENTH_PERCENTILE * 0.2)


def test_a_cluster_file_holds_its_calibration() -> None:
    cluster = replace(round_machine(), calibration=FOUND)
    text = cluster.to_toml()
    assert "[calibration.factors]\nproducts = 1.25" in text
    assert Cluster.from_toml(text) == cluster
    assert cluster.with_devices(4).calibration == FOUND


def test_a_cluster_without_a_calibration_has_no_such_table() -> None:
    assert "calibration" not in round_machine().to_toml()


def test_a_calibration_of_another_kind_of_device_is_refused() -> None:
    with pytest.raises(ClusterError, match="devices of kind cpu, and a calibration from runs on cuda"):
        replace(round_machine(kind="cpu"), calibration=FOUND)


@pytest.mark.parametrize(
    "factors",
    [{**FACTORS, "gpu": 1.0}, {k: v for k, v in FACTORS.items() if k != "tp"}, {**FACTORS, "tp": 0.0}],
)
def test_a_calibration_has_all_six_factors_above_zero(factors: dict[str, float]) -> None:
    with pytest.raises(
        ClusterError, match="needs a factor above zero for each of products, memory"
    ) as caught:
        replace(FOUND, factors=factors)
    assert str(caught.value.hint).startswith("[calibration.factors]\nproducts = 1.0\n")


def test_an_edited_table_is_refused_by_name() -> None:
    text = replace(round_machine(), calibration=FOUND).to_toml()
    with pytest.raises(ClusterError, match=r"\[calibration\]: date is missing"):
        Cluster.from_toml(text.replace('date = "2026-01-31"\n', ""))
    with pytest.raises(ClusterError, match="unknown key 'runs'"):
        Cluster.from_toml(text.replace("num_runs = 3", "num_runs = 3\nruns = 3"))
    rows = "covariance = [[1.0, 0.0, 0.0, 0.0, 0.0, 0.0]]"
    with pytest.raises(ClusterError, match="covariance of a calibration has 6 rows, not 1"):
        Cluster.from_toml("\n".join(rows if "covariance" in line else line for line in text.splitlines()))


def test_runs_on_all_parts_count_before_those_on_one() -> None:
    own, joint = (replace(FOUND, factors=dict.fromkeys(CAUSES, factor)) for factor in (3.0, 2.0))
    parts = (replace(round_machine(), calibration=own), round_machine())
    both = Cluster.of_parts(parts, name="both", network=parts[0].levels[-1])
    assert (both.calibration_of(0), both.calibration_of(1)) == (own, None)
    found = replace(both, calibration=joint)
    assert found.calibration_of(0) == found.calibration_of(1) == joint
    assert found.factors == joint.factors and both.factors == own.factors
    assert Cluster.from_toml(found.to_toml()) == found
    assert found.with_parts([4, 2]).calibration_of(1) == joint


def test_a_machine_whose_runs_nobody_looked_at_has_no_factor_left() -> None:
    parts = (replace(round_machine(), calibration=FOUND), round_machine())
    both = Cluster.of_parts(parts, name="both", network=parts[0].levels[-1], calibration=FOUND)
    bare = Cluster.of_parts((parts[1], parts[1]), name="both", network=parts[0].levels[-1])
    assert both.uncalibrated() == bare and parts[0].uncalibrated() == parts[1]


def test_parts_of_two_kinds_have_no_calibration_in_common() -> None:
    parts = (round_machine(), round_machine(kind="cpu"))
    with pytest.raises(
        ClusterError, match="devices of kind cpu and cuda, and a calibration from runs on cuda"
    ):
        Cluster.of_parts(parts, name="both", network=parts[0].levels[-1], calibration=FOUND)
