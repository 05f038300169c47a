"""One rank: measures what is asked for, and rank 0 writes it."""

from __future__ import annotations

import json
import os
import pickle
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist

from shardstage.compat import all_gather_single, reduce_scatter_single
from shardstage.data import Microbatch
from shardstage.graph.source import load_model
from shardstage.plan.plan import Plan
from shardstage.runtime.broken_group import drop_sums
from shardstage.runtime.build import build_engine
from shardstage.runtime.engine import Engine
from shardstage.runtime.optimizer import OptimizerConfig
from shardstage.runtime.process_group import BACKEND, register_backend
from shardstage.runtime.recorder import Recorder

NUM_WARM_UPS = 2
SIZES = tuple(1 << power for power in (12, 16, 18, 19, 20, 21, 22, 23, 24))
REPEATS = 5
PAUSE_S = 0.03
"""Between two calls: the token bucket of the slowest link fills up again, as it does while a step computes."""


def main() -> None:
    rank, address, job, out = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
    asked = pickle.loads(job.read_bytes())
    torch.set_num_threads(1)
    register_backend()
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{address}:{asked['port']}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=120),
    )
    found = {
        "steps": [measured_steps(case, asked, rank) for case in asked["cases"]],
        "links": measured_links(rank),
        "slowdown": measured_slowdown(),
    }
    everyone: list[Any] = [None, None]
    dist.all_gather_object(everyone, found)
    if rank == 0:
        out.write_text(json.dumps(everyone[0]))
    dist.barrier()
    os._exit(0)


class Round(NamedTuple):
    """The spans of all ranks, of a step that is silent and of one over the network."""

    silent: list[tuple[Any, ...]]
    real: list[tuple[Any, ...]]


def measured_steps(plan: Plan, asked: dict[str, Any], rank: int) -> list[Round]:
    silent, real = engine_of(plan, asked, rank, is_silent=True), engine_of(plan, asked, rank, is_silent=False)
    batches = batches_of(real, asked["sequence"], asked["vocabulary"])
    rounds = []
    for number in range(NUM_WARM_UPS + asked["num_steps"]):
        spans = Round(*(recorded(engine, batches, number) for engine in (silent, real)))
        if number >= NUM_WARM_UPS:
            rounds.append(spans)
    return rounds


def recorded(engine: Engine, batches: list[Microbatch], number: int) -> list[tuple[Any, ...]]:
    """The spans of a step, on one clock: the hosts are one machine."""
    recorder = engine.recorder = Recorder(engine.groups.rank, engine.device)
    dist.barrier()
    engine.step(number, batches)
    engine.recorder = None
    origins = engine.groups.gather(recorder.origin_s)
    spans = engine.groups.gather(recorder.spans(min(origins)))
    return [(s.rank, s.stream, s.name, s.start_s, s.end_s) for found in spans for s in found]


def engine_of(plan: Plan, asked: dict[str, Any], rank: int, *, is_silent: bool) -> Engine:
    """An engine whose groups talk over the network; a silent one's talk through memory, and what they sum stays as it is."""
    new_group = partial(dist.new_group, backend=BACKEND) if is_silent else dist.new_group
    with patch.object(dist, "new_group", new_group):
        engine = build_engine(
            asked["graph"],
            plan,
            load_model(asked["model"]),
            rank=rank,
            seed=0,
            optimizer=OptimizerConfig(lr=1e-4, max_grad_norm=1.0),
            device=torch.device("cpu"),
        )
    if is_silent:
        for group in (engine.groups.dp_group, engine.groups.tp_group):
            if group is not None:
                drop_sums(group)
    return engine


def batches_of(engine: Engine, sequence: int, vocabulary: int) -> list[Microbatch]:
    generator = torch.Generator().manual_seed(engine.groups.dp)
    start, found = sum(engine.plan.shares[: engine.groups.dp]), []
    for size in engine.plan.microbatches(engine.groups.dp):
        ids = torch.randint(0, vocabulary, (size, sequence + 1), generator=generator)
        positions = tuple(range(start, start + size))
        found.append(
            Microbatch(
                sample_ids=positions,
                positions=positions,
                tensors={"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()},
                num_targets=size * sequence,
            )
        )
        start += size
    return found


def measured_links(rank: int) -> dict[str, list[tuple[int, float]]]:
    """Median seconds by kind of call and bytes of the whole tensor."""

    def exchange(tensor: torch.Tensor) -> None:
        dist.send(tensor, 1) if rank == 0 else dist.recv(tensor, 0)

    everyone = dist.group.WORLD
    assert everyone is not None
    calls: dict[str, Callable[[torch.Tensor], object]] = {
        "all_reduce": dist.all_reduce,
        "all_gather": lambda t: all_gather_single(t, t[: t.numel() // 2].clone(), everyone),
        "reduce_scatter": lambda t: reduce_scatter_single(t[: t.numel() // 2].clone(), t, everyone),
        "p2p": exchange,
    }
    return {name: [(size, _seconds(call, size)) for size in SIZES] for name, call in calls.items()}


def _seconds(call: Callable[[torch.Tensor], object], num_bytes: int) -> float:
    tensor, found = torch.zeros(num_bytes // 4), []
    for _ in range(1 + REPEATS):
        time.sleep(PAUSE_S)
        dist.barrier()
        began_s = time.perf_counter()
        call(tensor)
        dist.barrier()
        found.append(time.perf_counter() - began_s)
    empty = []
    for _ in range(REPEATS):
        dist.barrier()
        began_s = time.perf_counter()
        dist.barrier()
        empty.append(time.perf_counter() - began_s)
    return max(1e-6, median(found[1:]) - median(empty))


def measured_slowdown() -> float:
    """Seconds of compute beside an all_reduce that lasts as long, over those of the same compute alone."""
    weights, message = torch.randn(384, 384), torch.zeros(1 << 20)

    def compute(count: int) -> None:
        for _ in range(count):
            weights @ weights

    dist.barrier()
    began_s = time.perf_counter()
    dist.all_reduce(message)
    talk_s = time.perf_counter() - began_s
    began_s = time.perf_counter()
    compute(200)
    count = max(10, round(200 * talk_s / (time.perf_counter() - began_s)))
    ratios = []
    for _ in range(REPEATS):
        dist.barrier()
        began_s = time.perf_counter()
        compute(count)
        alone_s = time.perf_counter() - began_s
        dist.barrier()
        began_s = time.perf_counter()
        work = dist.all_reduce(message, async_op=True)
        compute(count)
        ratios.append((time.perf_counter() - began_s) / alone_s)
        assert work is not None
        work.wait()
    return max(1.0, median(ratios))


if __name__ == "__main__":
    main()
