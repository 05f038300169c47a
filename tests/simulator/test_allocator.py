"""Traces whose blocks and segments were worked out by hand from the allocator's rules."""

from __future__ import annotations

import pytest

from shardstage.errors import ProgramError
from shardstage.simulator import Allocation, Replay, replay
from shardstage.units import KIB, MIB


def made(text: str, **options: int) -> Replay:
    """``"a=512 b=1MiB -a"``: a and b appear, a goes."""
    trace = []
    for word in text.split():
        if word.startswith("-"):
            trace.append(Allocation(word[1:], 0))
        else:
            name, size = word.split("=")
            unit = {"K": KIB, "M": MIB}.get(size[-1], 1)
            trace.append(Allocation(name, int(float(size.rstrip("KM")) * unit)))
    return replay(trace, **options)


@pytest.mark.parametrize(
    ("text", "allocated_bytes", "reserved_bytes"),
    [
        ("a=1", 512, 2 * MIB),
        ("a=513", 1024, 2 * MIB),
        ("a=1M b=1M", 2 * MIB, 2 * MIB),
        ("a=1M b=1M c=1", 2 * MIB + 512, 4 * MIB),
        ("a=1.5M", int(1.5 * MIB), 20 * MIB),
        ("a=9M b=9M", 18 * MIB, 20 * MIB),
        ("a=9M b=9M c=2M", 20 * MIB, 20 * MIB),
        ("a=10M", 10 * MIB, 10 * MIB),
        ("a=11M", 12 * MIB, 12 * MIB),
        ("a=1K b=2M", 2 * MIB + KIB, 22 * MIB),
    ],
)
def test_blocks_are_rounded_and_segments_have_the_pool_s_size(
    text: str, allocated_bytes: int, reserved_bytes: int
) -> None:
    found = made(text)
    assert (found.peak_allocated_bytes, found.reserved_bytes) == (allocated_bytes, reserved_bytes)


def test_a_large_block_is_split_only_if_more_than_a_mebibyte_is_left() -> None:
    kept = made("a=11M b=1.5M")
    assert kept.reserved_bytes == 32 * MIB, "1 MiB of 12 is left: it stays with a, and b needs a segment"
    shared = made("a=18.5M b=1.25M")
    assert shared.reserved_bytes == 20 * MIB, "1.5 MiB of 20 are left: b gets them whole"
    assert shared.peak_allocated_bytes == 20 * MIB


def test_a_freed_block_is_used_again_and_the_best_fit_is_chosen() -> None:
    """a leaves 4 MiB and c 3 MiB of a full segment; d of 3 MiB takes what c left, so that e of 4 MiB still fits."""
    assert made("a=4M x=2M c=3M y=11M -a -c d=3M e=4M").reserved_bytes == 20 * MIB
    assert made("a=4M x=2M c=3M y=11M -a -c d=3.5M e=4M").reserved_bytes == 40 * MIB


def test_neighbours_that_are_free_join() -> None:
    assert made("a=5M b=5M c=5M d=5M -b -c e=9.9M").reserved_bytes == 20 * MIB
    assert made("a=5M b=5M c=5M d=5M -a -c e=9.9M").reserved_bytes == 40 * MIB, "5 + 5 MiB apart are not 10"


def test_pools_do_not_lend_to_each_other() -> None:
    assert made("a=19M -a b=1K").reserved_bytes == 20 * MIB + 2 * MIB


def test_what_is_wholly_free_goes_back_before_memory_runs_out() -> None:
    found = made("a=30M -a b=40M", capacity_bytes=50 * MIB)
    assert (found.failed, found.reserved_bytes) == (None, 40 * MIB)
    kept = made("a=30M k=1.5M -a b=40M", capacity_bytes=50 * MIB)
    assert kept.failed == Allocation("b", 40 * MIB)


def test_fragmentation_is_what_the_peak_leaves_unused() -> None:
    found = made("a=12M -a b=14M")
    assert found.reserved_bytes == 26 * MIB and found.fragmentation == pytest.approx(1 - 14 / 26)
    assert made("").fragmentation == 0


def test_a_trace_that_cannot_be_is_refused() -> None:
    with pytest.raises(ProgramError, match="'a' is freed and was never allocated"):
        made("-a")
    with pytest.raises(ProgramError, match="'a' is allocated twice"):
        made("a=1 a=1")
