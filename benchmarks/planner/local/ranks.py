"""One rank: holds an engine for each plan, and has the plans take turns.

warm-up     every plan one step
rounds      every plan a turn of three steps, of which two are timed, in an order that is drawn anew each round
finals      the same of the contenders alone: the pick and what is nearly as fast as the best so far
"""

from __future__ import annotations

import gc
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from network import BACKEND, register_network_backend

from shardstage.data import Microbatch
from shardstage.graph import ModelGraph
from shardstage.graph.source import ModelSource, load_model
from shardstage.plan import Plan
from shardstage.runtime.build import build_engine
from shardstage.runtime.engine import Engine
from shardstage.runtime.environment import RankEnvironment, join_world
from shardstage.runtime.optimizer import OptimizerConfig

__all__ = ["Job", "measure"]

STEPS_OF_TURN = 3
"""In training a step comes after others of its own plan. The first one after another plan's is not timed: it finds caches and free
memory as that plan left them, and took up to twice as long."""
IS_CONTENDER_RATIO = 1.15
"""A plan that takes at most so many times the best one's median stays for the finals."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the ranks of one launch measure: no finals after ``limit_s``. ``out`` gets a line of JSON for each step as it was timed."""

    graph: ModelGraph
    model: str
    plans: tuple[Plan, ...]
    pick: int
    sequence: int | None
    num_rounds: int
    num_finals: int
    limit_s: float
    out: str


def measure(environment: RankEnvironment, job: Job) -> None:
    """All plans on this rank; rank 0 writes."""
    register_network_backend()
    join_world(environment, device="cpu", backend=BACKEND, timeout_s=180)
    source = load_model(job.model)
    began_s = time.perf_counter()
    runs = [_Run(plan, job, source, environment.rank) for plan in job.plans]
    if environment.rank == 0:
        print(f"  {len(runs)} engines built in {time.perf_counter() - began_s:.0f} s", flush=True)
    gc.collect()
    gc.freeze()
    for run in runs:
        run.step()
    everything = range(len(runs))
    steps: list[list[float]] = [[] for _ in runs]
    for number in range(job.num_rounds + job.num_finals):
        if number >= job.num_rounds and _is_late(began_s, job.limit_s):
            break
        asked = everything if number < job.num_rounds else _contenders(steps, job.pick)
        order = random.Random(number).sample(list(asked), len(asked))
        for index, seconds, cpu_s in _round(runs, order):
            steps[index].append(seconds)
            if environment.rank == 0:
                _write(job.out, {"round": number, "plan": index, "seconds": seconds, "cpu_s": cpu_s})


class _Run:
    """A plan's engine and the batch of its rank."""

    def __init__(self, plan: Plan, job: Job, source: ModelSource, rank: int) -> None:
        self.engine = build_engine(
            job.graph,
            plan,
            source,
            rank=rank,
            seed=0,
            optimizer=OptimizerConfig(lr=1e-4),
            device=torch.device("cpu"),
        )
        self.batches = _batches(self.engine, source, job.sequence)
        self._step = 0

    def turn(self) -> list[tuple[float, float, float]]:
        """Of each step what ``step`` says."""
        return [self.step() for _ in range(STEPS_OF_TURN)]

    def step(self) -> tuple[float, float, float]:
        """When it began and when it ended, on the clock that all ranks of a machine share, and CPU seconds of all of the rank's threads."""
        dist.barrier()
        began_s, cpu_began_s = time.perf_counter(), time.process_time()
        self.engine.step(self._step, self.batches)
        ended_s, cpu_s = time.perf_counter(), time.process_time() - cpu_began_s
        self._step += 1
        return began_s, ended_s, cpu_s


def _round(runs: Sequence[_Run], order: Sequence[int]) -> list[tuple[int, float, float]]:
    """Of each step that is timed its plan, the seconds from the first rank's begin to the last rank's end, and CPU seconds of all ranks."""
    turns = [runs[index].turn() for index in order]
    timed = [index for index in order for _ in range(1, STEPS_OF_TURN)]
    times = torch.tensor([step for turn in turns for step in turn[1:]], dtype=torch.float64)
    everyone = [torch.empty_like(times) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, times)
    began_s, ended_s, cpu_s = torch.stack(everyone).unbind(-1)  # [ranks, steps] each
    seconds = ended_s.amax(0) - began_s.amin(0)
    return list(zip(timed, seconds.tolist(), cpu_s.sum(0).tolist(), strict=True))


def _contenders(steps: Sequence[Sequence[float]], pick: int) -> list[int]:
    """Equal on all ranks: all have the same times."""
    medians = [median(found) for found in steps]
    limit_s = IS_CONTENDER_RATIO * min(medians)
    return [index for index, seconds in enumerate(medians) if seconds <= limit_s or index == pick]


def _is_late(began_s: float, limit_s: float) -> bool:
    """Whether rank 0's time is up; the same on all ranks."""
    elapsed_s = torch.tensor([time.perf_counter() - began_s])
    dist.broadcast(elapsed_s, src=0)
    return elapsed_s.item() > limit_s


def _batches(engine: Engine, source: ModelSource, sequence: int | None) -> list[Microbatch]:
    """The rank's share of one random batch, the same for all plans."""
    plan, dp = engine.plan, engine.groups.dp
    whole = source.task.random_batch(plan.global_batch, sequence)
    start, found = sum(plan.shares[:dp]), []
    for size in plan.microbatches(dp):
        positions = tuple(range(start, start + size))
        tensors = {name: tensor[start : start + size].clone() for name, tensor in whole.items()}
        found.append(
            Microbatch(
                sample_ids=positions,
                positions=positions,
                tensors=tensors,
                num_targets=tensors["labels"].numel(),
            )
        )
        start += size
    return found


def _write(out: str, row: dict[str, Any]) -> None:
    with Path(out).open("a", encoding="utf-8") as file:
        file.write(f"{json.dumps(row)}\n")
