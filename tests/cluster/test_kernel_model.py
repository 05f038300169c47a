"""Kernels by shape: tiles in waves over multiprocessors, rows that do not align, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardstage.cluster import load, preset_names
from shardstage.cluster.kernel_model import KernelModel, Tile
from shardstage.cluster.table import Table
from shardstage.errors import ClusterError

MODEL = KernelModel(
    num_sms=4,
    wave_ratio=1.0,
    tiles=(Tile(8, 4, 1.0),),
    attention_forward_ratio=0.5,
    attention_backward_ratio=0.4,
    moved_ratio=0.8,
    misaligned_ratio=0.5,
    launch_s=1.0,
    dispatch_s=2.0,
    sustained_ratio=1.0,
    overlap_slowdown=0.15,
    source="made up",
)
SIZES = st.integers(1, 300)


def seconds(m: int, n: int, k: int = 10, count: int = 1, model: KernelModel = MODEL) -> float:
    """On a device of 8 FLOPs a second, two for each of four multiprocessors: a tile's element of k = 1 takes a second."""
    return model.product_s(m, n, k, count, 8.0)


def test_a_full_wave_takes_its_flops_at_the_best_rate() -> None:
    assert seconds(16, 8, k=10) == pytest.approx(2 * 16 * 8 * 10 / 8)


def test_a_tile_that_is_begun_is_paid_whole() -> None:
    assert seconds(1, 1) == seconds(8, 4) == pytest.approx(8 * 4 * 10)


def test_one_tile_more_than_a_wave_takes_two_waves() -> None:
    assert seconds(32, 4) == pytest.approx(8 * 4 * 10)
    assert seconds(33, 4) == pytest.approx(2 * 8 * 4 * 10)


def test_what_is_not_quantised_spreads_over_the_last_wave() -> None:
    """Five tiles on four multiprocessors: 2 waves where quantised, 1.25 where spread out, and half of each in between."""
    spread, half = replace(MODEL, wave_ratio=0.0), replace(MODEL, wave_ratio=0.5)
    waves = [seconds(40, 4, model=model) / (8 * 4 * 10) for model in (MODEL, half, spread)]
    assert waves == pytest.approx([2.0, (2 + 1.25) / 2, 1.25])


def test_no_kernel_is_faster_than_its_first_wave() -> None:
    """A single tile keeps one multiprocessor busy however the rest idles."""
    assert seconds(8, 4, model=replace(MODEL, wave_ratio=0.0)) == seconds(8, 4)


def test_a_tile_lies_either_way() -> None:
    assert seconds(8, 4) == seconds(4, 8)
    assert seconds(16, 4) == seconds(4, 16)


def test_the_fastest_tile_is_taken() -> None:
    both = replace(MODEL, tiles=(Tile(8, 4, 1.0), Tile(2, 2, 0.5)))
    assert seconds(2, 2, model=both) == pytest.approx(2 * 2 * 10 / 0.5)
    assert seconds(64, 64, model=both) == seconds(64, 64)


def test_many_products_fill_the_waves_together() -> None:
    assert seconds(8, 4, count=4) == seconds(8, 4, count=1)
    assert seconds(8, 4, count=5) == 2 * seconds(8, 4)


def test_rows_that_do_not_align_keep_a_ratio_of_the_rate() -> None:
    aligned, not_aligned = (MODEL.product_s(8, 4, 10, 1, 8.0, row_bytes=b) for b in (32, 24))
    assert not_aligned == pytest.approx(aligned / 0.5)


def test_under_load_all_products_are_slower_alike() -> None:
    warm = replace(MODEL, sustained_ratio=0.8)
    assert seconds(24, 12, model=warm) == pytest.approx(seconds(24, 12) / 0.8)


@given(SIZES, SIZES, SIZES, st.integers(1, 5), st.floats(0, 1))
def test_a_larger_product_never_takes_less_time(
    m: int, n: int, k: int, count: int, wave_ratio: float
) -> None:
    model = replace(MODEL, wave_ratio=wave_ratio)
    once = seconds(m, n, k, count, model)
    larger = [(m + 1, n, k, count), (m, n + 1, k, count), (m, n, k + 1, count), (m, n, k, count + 1)]
    assert all(seconds(*sizes, model) >= once * (1 - 1e-12) for sizes in larger)


@given(SIZES, SIZES, SIZES)
def test_nothing_exceeds_the_best_rate(m: int, n: int, k: int) -> None:
    assert seconds(m, n, k) >= 2 * m * n * k / 8.0 * (1 - 1e-12)


def test_a_model_round_trips_through_its_table() -> None:
    table = MODEL.to_table()
    assert KernelModel.from_table(Table(table, "kernels")) == MODEL


@pytest.mark.parametrize(
    "name", ["moved_ratio", "misaligned_ratio", "sustained_ratio", "attention_forward_ratio"]
)
@pytest.mark.parametrize("ratio", [0.0, -1.0, 1.5])
def test_a_ratio_that_is_none_is_refused(name: str, ratio: float) -> None:
    table = {**MODEL.to_table(), name: ratio}
    with pytest.raises(ClusterError, match=f"{name} must lie above 0 and at most at 1"):
        KernelModel.from_table(Table(table, "kernels"))


def test_a_tile_that_reaches_nothing_is_refused() -> None:
    with pytest.raises(ClusterError, match="tiles must lie above 0"):
        replace(MODEL, tiles=(Tile(8, 8, 0.9), Tile(4, 4, 0.0)))
    with pytest.raises(ClusterError, match="tiles must lie above 0"):
        replace(MODEL, tiles=())


def test_a_device_without_multiprocessors_is_refused() -> None:
    with pytest.raises(ClusterError, match="num_sms must be at least 1"):
        replace(MODEL, num_sms=0)
    with pytest.raises(ClusterError, match="wave_ratio"):
        replace(MODEL, wave_ratio=1.5)
    with pytest.raises(ClusterError, match="overlap_slowdown must lie within 0 and 1"):
        replace(MODEL, overlap_slowdown=-0.1)


@pytest.mark.parametrize("name", [name for name in preset_names() if load(name).device.kernels is not None])
def test_a_preset_says_where_its_kernels_come_from_and_loses_rate_as_products_shrink(name: str) -> None:
    device = load(name).device
    model = device.kernels
    assert model is not None and len(model.source) > 40
    rate = device.rate("bfloat16")
    ratios = [2.0 * s**3 / (rate * model.product_s(s, s, s, 1, rate)) for s in (16384, 1024, 256, 64)]
    assert all(large > small for large, small in pairwise(ratios))
    assert 0.4 < ratios[0] < 1


@pytest.mark.parametrize(("size", "measured"), [(4096, 789e12), (8192, 798e12), (10240, 720e12)])
def test_an_h100_multiplies_at_the_rate_that_others_measured(size: int, measured: float) -> None:
    """Within an eighth; bfloat16, torch 2.7, in short runs: github.com/zzc0721/torch-performance-test-data issue 79."""
    h100 = load("h100").device
    assert h100.kernels is not None
    briefly = replace(h100.kernels, sustained_ratio=1.0)
    taken_s = briefly.product_s(size, size, size, 1, h100.rate("bfloat16"))
    assert 2 * size**3 / taken_s == pytest.approx(measured, rel=1 / 8)


@pytest.mark.parametrize(
    ("preset", "measured"), [("h100", (1290.1, 1377.3, 1351.4)), ("h200", (1300.6, 1366.3, 1318.0))]
)
def test_under_long_load_a_hopper_keeps_what_azure_measured(preset: str, measured: tuple[float, ...]) -> None:
    """fp8, after 10,000 products, of the best achieved: github.com/Azure/AI-benchmarking-guide; 'MAMF' table of stas00/ml-engineering."""
    model = load(preset).device.kernels
    assert model is not None
    assert model.sustained_ratio == pytest.approx(sum(measured) / 3 / 1402.6, abs=0.005)
