"""Quantities at the edge."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardstage import units
from shardstage.errors import ConfigError


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.50 KiB"),
        (80 * units.GIB, "80.0 GiB"),
        (123 * units.MIB, "123 MiB"),
    ],
)
def test_bytes_print_in_powers_of_1024(num_bytes: int, text: str) -> None:
    assert units.format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (2e-9, "2.00 ns"),
        (5e-5, "50.0 µs"),
        (0.00123, "1.23 ms"),
        (7.5, "7.50 s"),
        (150, "2 min 30 s"),
        (7260, "2 h 01 min"),
    ],
)
def test_seconds_print_in_the_unit_a_person_would_say(seconds: float, text: str) -> None:
    assert units.format_s(seconds) == text


def test_rates_print_in_powers_of_1000() -> None:
    assert units.format_flops(3.2e12) == "3.20 TFLOP"
    assert units.format_flops_per_s(989e12) == "989 TFLOP/s"
    assert units.format_bytes_per_s(4.5e11) == "450 GB/s"
    assert units.format_count(8_030_000_000) == "8.03 G"
    assert units.format_count(7) == "7"
    assert units.format_ratio(0.1234) == "12.3 %"


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("512", 512), ("80GiB", 80 * 2**30), ("80 GB", 80 * 10**9), ("1.5k", 1500)]
)
def test_memory_is_read_as_it_is_written(text: str, num_bytes: int) -> None:
    assert units.parse_bytes(text) == num_bytes


@given(st.integers(min_value=0, max_value=999))
def test_whole_gibibytes_survive_printing_and_reading(gib: int) -> None:
    assert units.parse_bytes(f"{gib}GiB") == gib * units.GIB


@pytest.mark.parametrize("text", ["", "eighty", "-1GB", "80 GiBs"])
def test_text_that_is_no_amount_of_memory_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match="is not an amount of memory") as caught:
        units.parse_bytes(text)
    assert '"80GiB"' in str(caught.value)


def test_dtypes_have_the_size_torch_gives_them() -> None:
    for name, size in units.DTYPE_BYTES.items():
        assert torch.empty((), dtype=getattr(torch, name)).element_size() == size
    with pytest.raises(ConfigError, match="unknown dtype 'float33'"):
        units.dtype_bytes("float33")


@pytest.mark.parametrize(
    ("dollars", "text"),
    [(0.000028459, "$0.0000285"), (0.0556, "$0.0556"), (3.4, "$3.40"), (1234.5, "$1,234.50"), (0.0, "$0.00")],
)
def test_small_prices_keep_three_digits(dollars: float, text: str) -> None:
    """A step of a small model on one device cost $0.0000."""
    assert units.format_dollars(dollars) == text
