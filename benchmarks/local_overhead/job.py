"""``Job``: the long-lived ranks of one configuration; between turns they are blocked on a pipe and use no core."""

from __future__ import annotations

import math
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from phases import Phases, measure_phases
from workload import Step, Workload

__all__ = ["Build", "Configuration", "Job", "Turn"]

Build = Callable[[Workload, int, int], Step]


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """``backend`` is that of the process group, ``""`` for none; ``peer`` names the torch-native way to do the same."""

    name: str
    build: Build
    num_ranks: int
    backend: str
    threads: int = 1
    peer: str = ""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """Consecutive steps: ``step_s`` seconds a step on the slowest rank, ``cpu_s`` seconds a step of all ranks' cores together,
    the loss of each step, rank 0's phases if asked for.
    """

    step_s: float
    cpu_s: float
    losses: tuple[float, ...]
    phases: Phases | None


@dataclass(frozen=True, kw_only=True)
class _Order:
    first_step: int
    num_steps: int
    has_phases: bool


@dataclass(frozen=True, kw_only=True)
class _Answer:
    elapsed_s: float
    cpu_s: float
    losses: tuple[float, ...]
    phases: Phases | None


class Job:
    """Starts the ranks, and has them take turns; ``close`` ends them."""

    def __init__(self, configuration: Configuration, workload: Workload) -> None:
        self.configuration = configuration
        size = configuration.num_ranks
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        spawning = multiprocessing.get_context("spawn")
        os.environ["OMP_NUM_THREADS"] = str(configuration.threads)  # read by a rank before it imports torch
        self._ranks: list[tuple[Any, Connection]] = []
        for rank in range(size):
            ours, theirs = spawning.Pipe()
            arguments = (configuration, workload, rank, self._store.port, theirs)
            started = spawning.Process(target=_serve, args=arguments, daemon=True)
            started.start()
            theirs.close()
            self._ranks.append((started, ours))

    def turn(self, first_step: int, num_steps: int, *, has_phases: bool = False) -> Turn:
        """Runs steps on all ranks; raises RuntimeError with the traceback of a rank that failed."""
        order = _Order(first_step=first_step, num_steps=num_steps, has_phases=has_phases)
        for _, connection in self._ranks:
            connection.send(order)
        answers = [self._answer(rank) for rank in range(len(self._ranks))]
        return Turn(
            step_s=max(answer.elapsed_s for answer in answers) / num_steps,
            cpu_s=sum(answer.cpu_s for answer in answers) / num_steps,
            losses=next(answer.losses for answer in answers if not math.isnan(answer.losses[0])),
            phases=answers[0].phases,
        )

    def close(self) -> None:
        for _, connection in self._ranks:
            connection.close()
        for started, _ in self._ranks:
            started.join(timeout=20)
            if started.is_alive():
                started.kill()

    def _answer(self, rank: int) -> _Answer:
        try:
            answer = self._ranks[rank][1].recv()
        except EOFError:
            answer = "the rank ended without a word"
        if isinstance(answer, _Answer):
            return answer
        raise RuntimeError(f"{self.configuration.name}, rank {rank}:\n{answer}")


def _serve(
    configuration: Configuration, workload: Workload, rank: int, port: int, connection: Connection
) -> None:
    """A rank: builds its step, then runs what is ordered until the driver closes the pipe."""
    torch.set_num_threads(configuration.threads)
    try:
        if configuration.backend:
            _join(configuration, rank, port)
        step = configuration.build(workload, rank, configuration.num_ranks)
        while True:
            order = connection.recv()
            connection.send(_run(step, order, configuration))
    except EOFError:
        if configuration.backend:
            dist.destroy_process_group()
    except Exception:
        connection.send(traceback.format_exc())


def _join(configuration: Configuration, rank: int, port: int) -> None:
    if configuration.backend == "shardstage":
        from shardstage.runtime.process_group import register_backend

        register_backend()
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group(configuration.backend, store=store, rank=rank, world_size=configuration.num_ranks)


def _run(step: Step, order: _Order, configuration: Configuration) -> _Answer:
    numbers = range(order.first_step, order.first_step + order.num_steps)
    if configuration.backend:
        dist.barrier()
    began_s, cpu_began_s = time.perf_counter(), time.process_time()
    losses, phases = measure_phases(step, numbers) if order.has_phases else ([step(n) for n in numbers], None)
    return _Answer(
        elapsed_s=time.perf_counter() - began_s,
        cpu_s=time.process_time() - cpu_began_s,
        losses=tuple(losses),
        phases=phases,
    )
