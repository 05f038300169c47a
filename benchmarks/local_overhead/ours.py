"""Our engine as a step: any plan, over the shared-memory process group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from workload import BETAS, EPS, LEARNING_RATE, WEIGHT_DECAY, Step, Workload

from shardstage.data import Microbatch
from shardstage.graph import ModelGraph
from shardstage.graph.capture import capture
from shardstage.graph.source import load_model
from shardstage.plan import check, complete, parse_request
from shardstage.plan.plan import Plan
from shardstage.runtime.build import build_engine
from shardstage.runtime.engine import Engine
from shardstage.runtime.optimizer import OptimizerConfig

__all__ = ["OurStep", "capture_model", "make_plan"]


def capture_model(workload: Workload) -> ModelGraph:
    return capture(load_model(str(workload.folder)), sequence=workload.sequence)


def make_plan(shorthand: str, graph: ModelGraph, workload: Workload, *, num_ranks: int) -> Plan:
    """The plan that ``shorthand`` asks for; without stages each rank takes its share in one microbatch."""
    request = parse_request(shorthand)
    share = workload.global_batch // (request.dp or 1)
    size = workload.microbatch if request.pp > 1 else share
    plan = complete(
        parse_request(f"{shorthand},mb={size}"),
        graph,
        num_ranks=num_ranks,
        global_batch=workload.global_batch,
        sequence=workload.sequence,
    )
    check(plan, graph, num_ranks=num_ranks)
    return plan


@dataclass(frozen=True, kw_only=True)
class OurStep:
    """``build`` makes the engine of a rank; graph and plan were made once, by the driver."""

    graph: ModelGraph
    plan: Plan

    def build(self, workload: Workload, rank: int, size: int) -> Step:
        folder = str(workload.folder)
        optimizer = OptimizerConfig(
            lr=LEARNING_RATE, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, max_grad_norm=None
        )
        engine = build_engine(
            self.graph,
            self.plan,
            load_model(folder),
            rank=rank,
            seed=0,
            optimizer=optimizer,
            device=torch.device("cpu"),
            weights_folder=folder,
        )

        def step(number: int) -> float:
            return engine.step(number, self._microbatches(engine, workload, number)).loss

        return step

    def _microbatches(self, engine: Engine, workload: Workload, number: int) -> list[Microbatch]:
        inputs, labels = workload.batch(number)
        dp = engine.groups.dp
        start = sum(self.plan.shares[:dp])
        found = []
        for size in self.plan.microbatches(dp):
            positions = range(start, start + size)
            part = slice(start, start + size)
            found.append(
                Microbatch(
                    sample_ids=tuple(positions),
                    positions=tuple(positions),
                    tensors={"input_ids": inputs[part], "labels": labels[part]},
                    num_targets=size * workload.sequence,
                )
            )
            start += size
        return found
