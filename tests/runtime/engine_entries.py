"""What the ranks of the engine's tests do: every plan in turn, on batches that depend on the step alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from shardstage.data import Microbatch
from shardstage.graph import ModelGraph
from shardstage.graph.source import load_model
from shardstage.plan import Plan
from shardstage.runtime.build import build_engine
from shardstage.runtime.engine import Engine
from shardstage.runtime.environment import RankEnvironment, join_world
from shardstage.runtime.optimizer import OptimizerConfig

GLOBAL_BATCH = 6
SEQUENCE = 15
NUM_STEPS = 2
VOCABULARY = 259
OPTIMIZER = OptimizerConfig(lr=3e-3, warmup_steps=1, total_steps=4, max_grad_norm=0.5)


class Case(NamedTuple):
    """A plan for a model; ``graph`` in the plan's precision."""

    model: str
    graph: ModelGraph
    plan: Plan


def run_cases(environment: RankEnvironment, cases: Sequence[Case], out: str) -> None:
    """Rank 0 writes, for each case, the step results and how many parameter elements each rank holds."""
    join_world(environment, device="cpu", backend="shardstage", timeout_s=60)
    found = []
    for case in cases:
        engine = engine_of(case, rank=environment.rank)
        steps = [engine.step(step, batches_of(engine, step)) for step in range(NUM_STEPS)]
        digest = hashlib.sha256()
        for leaf in engine.parameters.leaves:
            pieces = [(p.parameter.fqn, p.flat_start, p.offset) for p in leaf.pieces]
            digest.update(repr(pieces).encode() + leaf.master.detach().numpy().tobytes())
        dtypes = {str(g.dtype) for leaf in engine.parameters.leaves if (g := leaf.gradient()) is not None}
        held = sum(leaf.master.numel() for leaf in engine.parameters.leaves)
        found.append(
            {
                "losses": [result.loss for result in steps],
                "norms": [result.gradient_norm for result in steps],
                "targets": [result.num_targets for result in steps],
                "digests": engine.groups.gather(digest.hexdigest()),
                "gradient_dtypes": sorted(dtypes),
                "held": engine.groups.gather(held),
            }
        )
    if environment.rank == 0:
        Path(out).write_text(json.dumps(found))


def engine_of(case: Case, *, rank: int) -> Engine:
    return build_engine(
        case.graph,
        case.plan,
        load_model(case.model, tokenizer_vocab=VOCABULARY),
        rank=rank,
        seed=7,
        optimizer=OPTIMIZER,
        device=torch.device("cpu"),
    )


def global_batch(step: int) -> dict[str, torch.Tensor]:
    """Random tokens; the samples have different numbers of targets, and one has none."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCABULARY - 3, (GLOBAL_BATCH, SEQUENCE + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    for sample in range(GLOBAL_BATCH):
        labels[sample, : sample * SEQUENCE // (GLOBAL_BATCH - 1)] = -100
    return {"input_ids": tokens[:, :-1].contiguous(), "labels": labels}


def batches_of(engine: Engine, step: int) -> list[Microbatch]:
    whole, plan, dp = global_batch(step), engine.plan, engine.groups.dp
    start, found = sum(plan.shares[:dp]), []
    for size in plan.microbatches(dp):
        tensors: dict[str, Any] = {name: tensor[start : start + size] for name, tensor in whole.items()}
        found.append(
            Microbatch(
                sample_ids=tuple(range(start, start + size)),
                positions=tuple(range(start, start + size)),
                tensors=tensors,
                num_targets=int((tensors["labels"] != -100).sum()),
            )
        )
        start += size
    return found
