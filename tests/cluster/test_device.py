"""How fast a device multiplies."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.cluster.machines import device, gemm_curve

from shardstage.cluster import Cluster, GemmCurve, LinearCost, load, preset_names
from shardstage.errors import ClusterError


def test_a_measured_size_reaches_its_measured_rate() -> None:
    measured = device(gemm=(gemm_curve((10, 20), (1000, 40)),))
    assert measured.gemm_efficiency(10, dtype="float32") == pytest.approx(0.4)
    assert measured.gemm_efficiency(1000, dtype="float32") == pytest.approx(0.8)
    assert measured.gemm_s(1000, dtype="float32") == pytest.approx(25.0)


def test_between_sizes_the_rate_follows_a_power_law() -> None:
    measured = device(gemm=(gemm_curve((10, 20), (1000, 40)),))
    assert measured.gemm_efficiency(100, dtype="float32") * 50 == pytest.approx((20 * 40) ** 0.5)


def test_above_the_largest_size_the_rate_stays_and_below_the_smallest_the_law_goes_on() -> None:
    measured = device(gemm=(gemm_curve((100, 20), (200, 40)),))
    assert measured.gemm_efficiency(1e9, dtype="float32") == pytest.approx(0.8)
    assert measured.gemm_s(1, dtype="float32") == pytest.approx(measured.gemm_s(100, dtype="float32"))


def test_a_dtype_without_a_curve_borrows_the_shape_of_the_first() -> None:
    measured = device(gemm=(gemm_curve((10, 20), (1000, 40)),))
    assert measured.gemm_efficiency(10, dtype="bfloat16") == pytest.approx(0.4)
    assert measured.gemm_efficiency(10) == pytest.approx(0.4)
    assert device().gemm_efficiency(10, dtype="float32") == 1.0


def test_nothing_to_multiply_takes_no_time() -> None:
    assert device().gemm_s(0, dtype="float32") == 0.0


@pytest.mark.parametrize("preset", [load(name) for name in preset_names()], ids=preset_names())
@given(pair=st.tuples(st.floats(1, 1e15), st.floats(1, 1e15)).map(sorted))
def test_a_larger_product_never_takes_less_time_on_any_preset(preset: Cluster, pair: list[float]) -> None:
    small, large = (preset.device.gemm_s(flops, dtype="bfloat16") for flops in pair)
    assert small <= large * (1 + 1e-9)


def test_a_dtype_without_a_rate_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ClusterError, match="device 'toy' has no flops_per_s for float64") as caught:
        device().gemm_s(10, dtype="float64")
    assert "float32, bfloat16" in str(caught.value.hint)


@pytest.mark.parametrize(
    "points", [(), ((10.0, 1.0), (10.0, 2.0)), ((20.0, 1.0), (10.0, 2.0)), ((0.0, 1.0),)]
)
def test_a_curve_that_does_not_rise_is_refused(points: tuple[tuple[float, float], ...]) -> None:
    with pytest.raises(ClusterError, match="must have positive points of rising size"):
        GemmCurve(dtype="float32", points=points, source="")


def test_a_device_without_memory_or_rates_is_refused() -> None:
    with pytest.raises(ClusterError, match="device 'toy': memory_bytes must be above zero, not 0"):
        device(memory_bytes=0)
    with pytest.raises(ClusterError, match="device 'toy': bfloat16 must be above zero, not -1"):
        device(flops_per_s={"bfloat16": -1})
    with pytest.raises(ClusterError, match="device 'toy' has no flops_per_s"):
        device(flops_per_s={})


def test_every_gpu_preset_has_a_price_with_its_source_and_a_newer_gpu_costs_more() -> None:
    devices = [load(name).device for name in ("a100-40", "a100-80", "h100", "h200", "b200")]
    prices = [each.price_per_hour or 0.0 for each in devices]
    assert prices == sorted(prices)
    assert 1 < prices[0] < prices[-1] < 20
    assert all("AWS" in each.price_source for each in devices)


def test_a_compute_capability_says_whether_there_is_bfloat16_and_is_above_zero() -> None:
    assert [device(kind="cuda", compute_capability=each).has_bfloat16 for each in (None, 7.5, 8.0)] == [
        True,
        False,
        True,
    ]
    assert not device(kind="cpu").has_bfloat16
    with pytest.raises(ClusterError, match="device 'toy': compute_capability must be above zero, not 0"):
        device(compute_capability=0.0)


def test_a_price_is_optional_and_cannot_be_zero_or_without_a_source() -> None:
    assert device().price_per_hour is None
    with pytest.raises(ClusterError, match="device 'toy': price_per_hour must be above zero, not 0"):
        device(price_per_hour=0.0, price_source="made up")
    priced = replace(load("cpu"), device=device(price_per_hour=1.5, price_source="made up"))
    assert Cluster.from_toml(priced.to_toml()) == priced
    with pytest.raises(ClusterError, match=r"\[device\]: price_source is missing"):
        Cluster.from_toml(priced.to_toml().replace('price_source = "made up"\n', ""))


def test_a_rank_alone_is_no_slower_than_among_others() -> None:
    with pytest.raises(ClusterError, match=r"alone_ratio is 0\.5") as raised:
        device(alone_ratio=0.5)
    assert "alone_ratio = 1.0" in str(raised.value)


def test_a_message_takes_some_time() -> None:
    with pytest.raises(ClusterError, match=r"bytes_per_s > 0, not \(0\.001, 0\.0\)") as raised:
        device(message=LinearCost(1e-3, 0.0))
    assert "[device.message]" in str(raised.value)
