"""Collectives and messages among CPU ranks of one host: shared memory against gloo, alternating in the same run.

python benchmarks/shared_memory_collectives/run.py [--ranks 2] [--rounds 7] [--max-bytes 67108864]

Prints one row per operation and size: median microseconds per call over the rounds of gloo, of our process group with
private tensors, and with tensors from ``allocate_shared``; and gloo's time over each of ours.
A size is the bytes of the whole tensor: what is reduced, what is gathered, what is scattered, one message.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from shardstage.runtime.process_group import BACKEND, allocate_shared, register_backend

SIZES_BYTES = (1 << 10, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24, 1 << 26)
BYTES_PER_ROUND = 1 << 25  # a round repeats a call until it has moved this much, 3 to 100 times
CARRIERS = ("gloo", "ours", "ours_shared")
Call = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Tensors:
    """whole: [n * N] and part: [N], which is rank's run of whole where both are shared."""

    whole: torch.Tensor
    part: torch.Tensor


def main() -> None:
    """Starts the ranks; rank 0 prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--max-bytes", type=int, default=SIZES_BYTES[-1])
    options = parser.parse_args()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    arguments = (options.ranks, store.port, options.rounds, options.max_bytes)
    multiprocessing.spawn(measure, arguments, nprocs=options.ranks)  # type: ignore[no-untyped-call]  # torch's is untyped


def measure(rank: int, size: int, port: int, rounds: int, max_bytes: int) -> None:
    """One rank: every operation at every size."""
    torch.set_num_threads(1)
    register_backend()
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group(BACKEND, store=store, rank=rank, world_size=size)
    gloo = dist.new_group(backend="gloo")
    if rank == 0:
        print(f"{size} ranks x 1 thread, torch {torch.__version__}, {platform.platform()}\n")
        print(
            "| operation | bytes | gloo µs | ours µs | ours, shared µs | gloo / ours | gloo / ours, shared |"
        )
        print("|---|---|---|---|---|---|---|")
    for num_bytes in SIZES_BYTES:
        if num_bytes > max_bytes:
            break
        for operation, calls in operations(num_bytes, rank, size, gloo):
            times_s = alternate(calls, num_bytes, rounds)
            if rank == 0:
                print(row(operation, num_bytes, times_s), flush=True)
    dist.destroy_process_group()


def operations(
    num_bytes: int, rank: int, size: int, gloo: dist.ProcessGroup
) -> Iterator[tuple[str, dict[str, Call]]]:
    """Every operation with its call per carrier."""
    numel = num_bytes // 4 // size
    private = Tensors(whole=torch.zeros(numel * size), part=torch.zeros(numel))
    buffer = allocate_shared(numel * size, torch.float32)
    shared = Tensors(whole=buffer, part=buffer[rank * numel : (rank + 1) * numel])
    ours = dist.group.WORLD
    assert ours is not None
    cases = {"gloo": (gloo, private), "ours": (ours, private), "ours_shared": (ours, shared)}
    yield "all_reduce", {name: reducing(*case) for name, case in cases.items()}
    yield "all_gather", {name: gathering(*case) for name, case in cases.items()}
    yield "reduce_scatter", {name: scattering(*case) for name, case in cases.items()}
    cases.pop("ours_shared")
    yield "send + recv", {name: sending(group, tensors, rank) for name, (group, tensors) in cases.items()}


def reducing(group: dist.ProcessGroup, tensors: Tensors) -> Call:
    return lambda: dist.all_reduce(tensors.whole, group=group)


def gathering(group: dist.ProcessGroup, tensors: Tensors) -> Call:
    return lambda: dist.all_gather_single(tensors.whole, tensors.part, group=group)


def scattering(group: dist.ProcessGroup, tensors: Tensors) -> Call:
    return lambda: dist.reduce_scatter_single(tensors.part, tensors.whole, group=group)


def sending(group: dist.ProcessGroup, tensors: Tensors, rank: int) -> Call:
    """Ranks 0 and 1 exchange the tensor both ways, one after the other; the others look on."""

    def exchange() -> None:
        for source in (0, 1):
            work = None
            if rank == source:
                work = dist.isend(tensors.whole, 1 - source, group=group)
            elif rank < 2:
                work = dist.irecv(tensors.whole, source, group=group)
            if work is not None:
                work.wait()

    return exchange


def alternate(calls: dict[str, Call], num_bytes: int, rounds: int) -> dict[str, float]:
    """Median seconds per call and carrier; in every round all carriers take their turn, after one round to warm up."""
    repeats = max(3, min(100, BYTES_PER_ROUND // num_bytes))
    times_s: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            dist.barrier()
            began_s = time.perf_counter()
            for _ in range(repeats):
                call()
            times_s[name].append((time.perf_counter() - began_s) / repeats)
    return {name: statistics.median(times[1:]) for name, times in times_s.items()}


def row(operation: str, num_bytes: int, times_s: dict[str, float]) -> str:
    times = [f"{times_s[name] * 1e6:,.0f}" if name in times_s else "" for name in CARRIERS]
    ratios = [f"{times_s['gloo'] / times_s[name]:.1f}" if name in times_s else "" for name in CARRIERS[1:]]
    return f"| {operation} | {num_bytes:,} | {' | '.join(times)} | {' | '.join(ratios)} |"


if __name__ == "__main__":
    main()
