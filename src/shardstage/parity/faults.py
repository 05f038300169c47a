"""Faults that a proof must find, put into a run on purpose: for tests, and to see what a failing proof says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from shardstage.data import Microbatch, RankBatches
from shardstage.errors import ConfigError
from shardstage.graph.fallback import capture_or_blocks
from shardstage.program import lower
from shardstage.runtime.broken_group import drop_sums
from shardstage.runtime.engine import Engine
from shardstage.runtime.groups import RankGroups
from shardstage.sharding.rules import is_random
from shardstage.training.job import TrainJob, source_of

__all__ = ["FAULTS", "Fault", "broken_batches", "broken_job", "check_fault", "inject"]

Fault = Literal[
    "missing-reduction",
    "missing-tp-reduction",
    "doubled-loss",
    "wrong-rng",
    "lost-tie",
    "dtype",
    "swapped-batch",
]

FAULTS: Mapping[Fault, str] = {
    "missing-reduction": "gradients are not summed over dp",
    "missing-tp-reduction": "partial results are not summed over tp",
    "doubled-loss": "every target counts twice",
    "wrong-rng": "each rank draws its own dropout masks",
    "lost-tie": "stages that share a parameter do not sum its gradient",
    "dtype": "the ranks compute in bfloat16",
    "swapped-batch": "the last dp rank reads the samples of the step after",
}


def check_fault(fault: Fault, job: TrainJob) -> None:
    """Raises ConfigError for a job in which the fault would change nothing."""
    needs: Mapping[Fault, tuple[bool, str, str]] = {
        "missing-reduction": (job.plan.mesh.dp > 1, "a plan with dp > 1", '--plan "dp=2"'),
        "missing-tp-reduction": (job.plan.mesh.tp > 1, "a plan with tp > 1", '--plan "tp=2"'),
        "wrong-rng": (any(map(is_random, job.graph.ops)), "a model with dropout", "--model gpt2-tiny"),
        "lost-tie": (
            _has_tie(job),
            "a parameter that several stages share",
            '--model gpt2-tiny --plan "pp=2"',
        ),
        "dtype": (job.plan.precision != "bfloat16", "a run in a finer dtype", "--precision float32"),
    }
    is_possible, needed, hint = needs.get(fault, (True, "", ""))
    if not is_possible:
        raise ConfigError(f"the fault {fault!r} needs {needed}", hint=hint)


def broken_job(fault: Fault, job: TrainJob) -> TrainJob:
    """The job that the ranks are given in place of ``job``."""
    if fault != "dtype":
        return job
    graph = capture_or_blocks(source_of(job.config), sequence=job.config.data.sequence, dtype="bfloat16")
    return replace(job, graph=graph, plan=replace(job.plan, precision="bfloat16"))


def inject(fault: Fault, engine: Engine) -> None:
    """Breaks an engine; every rank of the world calls it before the first step."""
    groups = engine.groups
    if fault == "missing-reduction" and groups.dp_group is not None:
        drop_sums(groups.dp_group)
    elif fault == "missing-tp-reduction" and groups.tp_group is not None:
        drop_sums(groups.tp_group)
    elif fault == "lost-tie":
        for group in groups.tie_groups.values():
            drop_sums(group)
    elif fault == "wrong-rng":
        engine.random.seed += 1 + groups.rank


def broken_batches(fault: Fault, batches: RankBatches, step: int, groups: RankGroups) -> Sequence[Microbatch]:
    """The microbatches of ``step`` that a rank runs."""
    if fault == "swapped-batch" and groups.dp == groups.mesh.dp - 1:
        return batches.step(step + 1)
    found = batches.step(step)
    if fault == "doubled-loss":  # the loss is a sum over a number of targets: half the number, twice the loss
        return [replace(batch, num_targets=batch.num_targets // 2) for batch in found]
    return found


def _has_tie(job: TrainJob) -> bool:
    return any(
        axis.startswith("tie") for p in lower(job.graph, job.plan).parameters for axis in p.summed_over
    )
