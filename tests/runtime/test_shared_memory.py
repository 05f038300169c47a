"""Segments, exchanges and collectives among ranks that are threads of this process: nothing is spawned."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from shardstage.errors import ProgramError, RankFailedError
from shardstage.runtime import shared_rendezvous
from shardstage.runtime.collectives import Reduction, reduce_into
from shardstage.runtime.shared_collectives import SharedCollectives
from shardstage.runtime.shared_memory import Progress, SharedMemoryOptions, SharedSegments
from shardstage.runtime.shared_pipes import SharedPipes
from shardstage.runtime.shared_rendezvous import connect

SMALL = SharedMemoryOptions(slot_bytes=4096, part_bytes=64, num_parts=4)
Call = Callable[[SharedSegments], Any]


@pytest.fixture(autouse=True)
def quick_turns() -> Iterator[None]:
    """Threads that look at memory in turn must take short turns."""
    before_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before_s)


def connected(
    size: int, options: list[SharedMemoryOptions] | None = None, timeout_s: float = 20
) -> list[SharedSegments | None]:
    store = dist.HashStore()

    def join(rank: int) -> SharedSegments | None:
        return connect(
            store,
            rank=rank,
            size=size,
            labels=[f"rank {10 + peer}" for peer in range(size)],
            options=options[rank] if options else SMALL,
            timeout_s=timeout_s,
            progress=Progress(),
        )

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(join, range(size)))


def ranks(size: int, timeout_s: float = 20) -> list[SharedSegments]:
    found = [segments for segments in connected(size, timeout_s=timeout_s) if segments is not None]
    assert len(found) == size
    return found


def on_all(group: list[SharedSegments], call: Call) -> list[Any]:
    with ThreadPoolExecutor(len(group)) as threads:
        return list(threads.map(call, group))


def test_every_rank_reads_what_every_rank_wrote_in_this_exchange() -> None:
    def add_up(segments: SharedSegments) -> list[int]:
        seen = []
        for step in range(50):
            segments.outbox(torch.int64)[0] = 100 * step + segments.rank
            inbox = segments.exchange(torch.int64)
            assert inbox is not None
            seen.append(sum(int(slot[0]) for slot in inbox))
        return seen

    assert on_all(ranks(3), add_up) == [[300 * step + 3 for step in range(50)]] * 3


def test_a_segment_has_no_name_and_leaves_no_open_file() -> None:
    before = set(os.listdir("/dev/shm")), len(os.listdir("/proc/self/fd"))
    group = ranks(2)
    assert set(os.listdir("/dev/shm")) == before[0]
    for segments in group:
        segments.close()
    del segments, group
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before[1]


def test_ranks_with_different_options_do_not_share() -> None:
    other = SharedMemoryOptions(slot_bytes=8192, part_bytes=64, num_parts=4)
    assert connected(3, [SMALL, other, SMALL]) == [None] * 3


def test_one_rank_that_may_not_share_is_enough() -> None:
    assert connected(2, [SMALL, SharedMemoryOptions(enabled=False)]) == [None] * 2


def test_ranks_of_different_hosts_do_not_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_rendezvous, "_host", lambda: f"host of {threading.get_ident()}")
    barrier = threading.Barrier(2)  # so that two threads, with two numbers, are really used
    monkeypatch.setattr(shared_rendezvous.secrets, "token_hex", lambda _: f"{barrier.wait():016}")
    assert connected(2) == [None] * 2


def test_other_machines_than_x86_do_not_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_rendezvous.platform, "machine", lambda: "aarch64")
    assert connected(2) == [None] * 2


def test_a_file_that_is_not_the_promised_one_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = shared_rendezvous.create_mapping(SMALL.segment_bytes(2), "other")
    os.close(zeros[0])
    monkeypatch.setattr(shared_rendezvous, "open_mapping", lambda *_: zeros[1])
    assert connected(2) == [None] * 2


def test_a_file_that_cannot_be_opened_means_no_sharing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise PermissionError("another user's process")

    monkeypatch.setattr(shared_rendezvous, "open_mapping", refuse)
    assert connected(2) == [None] * 2


@pytest.mark.parametrize("options", [{"slot_bytes": 5000}, {"slot_bytes": 0}, {"part_bytes": 100}])
def test_sizes_that_would_not_align_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ProgramError, match="must be multiples of 4096 and of 64"):
        SharedMemoryOptions(**options)


def test_a_missing_rank_is_named_after_the_timeout() -> None:
    first, _ = ranks(2, timeout_s=0.1)
    with pytest.raises(RankFailedError, match=r"rank 11 \(pid \d+\) did not arrive within 0.1 s") as raised:
        first.exchange(torch.uint8)
    assert "while group rank 0 of 2 waited in exchange 1" in raised.value.message


def test_a_rank_that_left_is_named() -> None:
    first, second = ranks(2)
    second.close()
    with pytest.raises(RankFailedError, match=r"rank 11 \(pid \d+\) has left the group"):
        first.exchange(torch.uint8)


def test_a_rank_that_came_and_then_left_is_no_error() -> None:
    first, second = ranks(2)
    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(second.exchange, torch.uint8)
        assert first.exchange(torch.uint8) is not None
        other.result()
    second.words[1][0] += 1  # it has announced its next exchange
    second.close()
    assert first.exchange(torch.uint8) is not None


def test_different_calls_name_both() -> None:
    def call(segments: SharedSegments) -> str:
        with pytest.raises(ProgramError, match="the sequences differ") as raised:
            segments.exchange(torch.uint8, (1, 0, 0, 5 + segments.rank, 0, 0, 0, 0))
        return raised.value.message

    of_first, of_second = on_all(ranks(2), call)
    assert "group rank 1 called (kind, operator, dtype, size, root) = (1, 0, 0, 6, 0)" in of_first
    assert "group rank 0 called (kind, operator, dtype, size, root) = (1, 0, 0, 5, 0)" in of_second


def test_a_call_whose_tensors_lie_differently_comes_out_mixed() -> None:
    def call(segments: SharedSegments) -> tuple[bool, bool]:
        mixed = segments.exchange(torch.uint8, (1, 0, 0, 5, 0, segments.rank, 0, 0)) is None
        free = segments.exchange(torch.uint8, (1, 0, 0, 5, 0, 0, 0, segments.rank)) is not None
        return mixed, free

    assert on_all(ranks(2), call) == [(True, True)] * 2


def test_an_allocation_is_found_by_every_slice_of_it() -> None:
    group = ranks(2)
    one, two = on_all(group, lambda segments: segments.allocate(400))
    buffer = one.buffers[0].view(torch.float32)
    assert group[0].place_of(buffer) == (one, 0)
    assert group[0].place_of(buffer[90:]) == (one, 360)
    assert group[0].place_of(torch.zeros(3)) is None
    assert group[1].place_of(buffer) is None, "the first rank's mapping is not the second's"
    two.buffers[0][7] = 3
    assert one.buffers[0][7] == 3
    assert two.index == one.index == 1


@settings(max_examples=25, deadline=None)
@given(
    size=st.integers(1, 4),
    numel=st.sampled_from([0, 1, 7, 1024, 1025, 5000]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64]),
    is_shared=st.booleans(),
)
def test_any_all_reduce_is_the_reduction_in_rank_order(
    size: int, numel: int, dtype: torch.dtype, is_shared: bool
) -> None:
    inputs = [(torch.randn(numel) * 50).to(dtype) for _ in range(size)]

    def call(segments: SharedSegments) -> torch.Tensor:
        mine = torch.zeros(numel, dtype=dtype)
        if is_shared:
            mine = segments.allocate(mine.nbytes).buffers[segments.rank].view(dtype)
        mine.copy_(inputs[segments.rank])
        SharedCollectives(segments).all_reduce(mine, Reduction.SUM)
        return mine.clone()

    expected = torch.empty(numel, dtype=dtype)
    reduce_into(expected, inputs, Reduction.SUM)
    for actual in on_all(ranks(size), call):
        assert torch.equal(actual, expected)


@settings(max_examples=15, deadline=None)
@given(rows=st.lists(st.lists(st.integers(0, 3000), min_size=3, max_size=3), min_size=3, max_size=3))
def test_any_all_to_all_transposes_the_runs(rows: list[list[int]]) -> None:
    def call(segments: SharedSegments) -> bool:
        rank = segments.rank
        sent = [torch.full((numel,), 10 * rank + peer) for peer, numel in enumerate(rows[rank])]
        received = [torch.zeros(rows[peer][rank], dtype=torch.int64) for peer in range(3)]
        SharedCollectives(segments).all_to_all(received, sent)
        return all(bool((part == 10 * peer + rank).all()) for peer, part in enumerate(received))

    assert on_all(ranks(3), call) == [True] * 3


@settings(max_examples=25, deadline=None)
@given(
    messages=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 900)), max_size=8),
    order=st.permutations(range(4)),
)
def test_any_messages_arrive_in_any_order_of_tags(messages: list[tuple[int, int]], order: list[int]) -> None:
    """Of one tag in the order sent; the tags in any order, also when the messages overfill the parts."""

    def call(segments: SharedSegments) -> list[tuple[int, int, list[int]]]:
        pipes = SharedPipes(segments)
        if segments.rank == 0:
            works = [
                pipes.send(torch.full((numel,), index, dtype=torch.uint8), 1, tag)
                for index, (tag, numel) in enumerate(messages)
            ]
            for work in works:
                work.wait()
            return []
        received = []
        for tag in order:
            for index, (_, numel) in enumerate(messages):
                if messages[index][0] == tag:
                    tensor = torch.zeros(numel, dtype=torch.uint8)
                    pipes.receive(tensor, 0, tag).wait()
                    received.append((index, numel, tensor.unique().tolist()))
        return received

    received = on_all(ranks(2), call)[1]
    expected = [(index, numel, [index] if numel else []) for index, (_, numel) in enumerate(messages)]
    assert sorted(received) == expected


def test_a_message_to_oneself_is_refused() -> None:
    pipes = SharedPipes(ranks(2)[0])
    with pytest.raises(ProgramError, match="cannot exchange messages with group rank 0"):
        pipes.send(torch.zeros(1), 0, 0)


def test_a_wait_moves_on_what_was_registered_and_no_more_after_removal() -> None:
    progress, calls = Progress(), []
    poll = lambda: calls.append(1)  # noqa: E731
    progress.add(poll)
    progress.poll()
    progress.remove(poll)
    progress.remove(poll)
    progress.poll()
    assert calls == [1]


@pytest.mark.parametrize("num_sources", [1, 2, 3, 5])
@pytest.mark.parametrize("position", [0, -1, None])
def test_a_reduction_may_write_over_one_of_its_sources(num_sources: int, position: int | None) -> None:
    sources = [torch.randn(9) for _ in range(num_sources)]
    expected = sources[0].clone()
    for source in sources[1:]:
        expected += source
    out = torch.empty(9) if position is None else sources[position]
    reduce_into(out, sources, Reduction.SUM)
    assert torch.equal(out, expected)


def test_half_precision_averages_do_not_overflow_on_the_way() -> None:
    out = torch.empty(1, dtype=torch.float16)
    reduce_into(out, [torch.full((1,), 60000.0, dtype=torch.float16)] * 2, Reduction.AVG)
    assert out.item() == 60000
