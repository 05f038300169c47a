"""``train_rank``: what every rank of a training run does."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch

from shardstage import checkpoint
from shardstage.data import BatchSampler, PackedText, RankBatches
from shardstage.errors import CheckpointError
from shardstage.runtime.build import build_engine
from shardstage.runtime.engine import Engine, StepResult
from shardstage.runtime.environment import RankEnvironment, join_world
from shardstage.runtime.peak_memory import PeakMemory
from shardstage.training.job import TrainJob, source_of
from shardstage.training.progress import Progress
from shardstage.training.run_config import RunConfig
from shardstage.training.state import accept_loaded, state_entries

__all__ = ["join_job", "rank_batches", "train_joined", "train_rank"]

WARM_UP_STEPS = 2
"""Steps left out of the median step time: allocators, caches and lazy initialisation of libraries settle in them."""


def train_rank(environment: RankEnvironment, job: TrainJob) -> None:
    """Trains, logs and checkpoints; rank 0 draws the progress bar and writes ``summary.json``."""
    train_joined(environment, job, join_job(environment, job.config))


def train_joined(environment: RankEnvironment, job: TrainJob, device: torch.device) -> None:
    """``train_rank`` of a rank that is in the world already."""
    memory = PeakMemory(device)
    source = source_of(job.config)
    engine = build_engine(
        job.graph,
        job.plan,
        source,
        rank=environment.rank,
        seed=job.config.seed,
        optimizer=job.config.optimizer,
        device=device,
        weights_folder=job.config.weights or None,
    )
    batches = rank_batches(job, engine)
    first_step = _resume(engine, batches, job) if job.config.resume else 0
    step_times_s = _train(engine, batches, job, first_step)
    _write_summary(engine, job, step_times_s, memory.peak_bytes())


def join_job(environment: RankEnvironment, config: RunConfig) -> torch.device:
    """Joins the world over shared memory and gloo on CPU, NCCL on CUDA; returns this rank's device."""
    is_cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    join_world(
        environment,
        device="cuda" if is_cuda else "cpu",
        backend=None if is_cuda else "shardstage",
        timeout_s=config.timeout_s,
    )
    return torch.device("cuda", torch.cuda.current_device()) if is_cuda else torch.device("cpu")


def rank_batches(job: TrainJob, engine: Engine) -> RankBatches:
    """This rank's share of every global batch; ranks that differ only in pp and tp read the same samples."""
    data = PackedText.from_config(job.config.data)
    plan, dp = job.plan, engine.groups.dp
    sampler = BatchSampler(num_samples=data.num_samples, global_batch=plan.global_batch, seed=job.config.seed)
    start = sum(plan.shares[:dp])
    return RankBatches(
        data, sampler, share=range(start, start + plan.shares[dp]), microbatches=plan.microbatches(dp)
    )


def _train(engine: Engine, batches: RankBatches, job: TrainJob, first_step: int) -> list[float]:
    config = job.config
    step_times_s = []
    with Progress(config, job.plan, first_step, is_shown=engine.groups.rank == 0) as progress:
        log = _Log(Path(job.folder) / "log.jsonl") if engine.groups.rank == 0 else None
        for step in range(first_step, config.steps):
            started_s = time.perf_counter()
            result = engine.step(step, batches.step(step))
            elapsed_s = time.perf_counter() - started_s
            step_times_s.append(elapsed_s)
            progress.advance(step, result, elapsed_s)
            if log is not None:
                log.write(step, result, elapsed_s)
            is_due = config.checkpoint_every and (step + 1) % config.checkpoint_every == 0
            if is_due or step + 1 == config.steps:
                _save(engine, batches, job, step + 1)
    return step_times_s


def _save(engine: Engine, batches: RankBatches, job: TrainJob, step: int) -> None:
    checkpoint.save(
        Path(job.folder) / "checkpoints",
        step,
        state_entries(engine),
        _extra(job, batches, step),
        keep=job.config.keep_checkpoints,
    )


def _extra(job: TrainJob, batches: RankBatches, step: int) -> Mapping[str, Any]:
    return {
        "step": step,
        "data": batches.state_dict(),
        "seed": job.config.seed,  # all randomness is drawn from (seed, step, sample): there is no other state
        "graph_fingerprint": job.plan.graph_fingerprint,
        "model": job.config.model,
    }


def _resume(engine: Engine, batches: RankBatches, job: TrainJob) -> int:
    """Loads the newest checkpoint of the run folder; returns the step to go on with."""
    folder = Path(job.folder) / "checkpoints"
    if checkpoint.latest(folder) is None:
        raise CheckpointError(f"there is no checkpoint in {folder} to resume from", hint="leave out --resume")
    extra = checkpoint.load(folder, "latest", state_entries(engine))
    accept_loaded(engine, num_steps=int(extra["step"]))
    batches.load_state_dict(extra["data"])
    return int(extra["step"])


class _Log:
    """``log.jsonl``: one line a step, written at once."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, step: int, result: StepResult, elapsed_s: float) -> None:
        self._file.write(json.dumps({"step": step, **asdict(result), "step_time_s": elapsed_s}) + "\n")


def _write_summary(engine: Engine, job: TrainJob, step_times_s: list[float], peak_bytes: int) -> None:
    """Gathers each rank's figures on rank 0, which writes them."""
    steady = step_times_s[min(WARM_UP_STEPS, max(0, len(step_times_s) - 1)) :]
    mine = {"peak_bytes": peak_bytes, "step_time_s": median(steady) if steady else None}
    everyone = engine.groups.gather(mine)
    if engine.groups.rank:
        return
    lines = list(_log_lines(Path(job.folder) / "log.jsonl"))
    step_time_s = max((rank["step_time_s"] for rank in everyone if rank["step_time_s"]), default=None)
    tokens = job.plan.global_batch * (job.plan.sequence or 1)
    summary = {
        "steps": len(step_times_s),
        "first_loss": lines[0]["loss"] if lines else None,
        "last_loss": lines[-1]["loss"] if lines else None,
        "step_time_s": step_time_s,
        "tokens_per_s": tokens / step_time_s if step_time_s else None,
        "peak_bytes": [rank["peak_bytes"] for rank in everyone],
        "threads_per_rank": torch.get_num_threads(),
    }
    (Path(job.folder) / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def _log_lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        yield from map(json.loads, path.read_text(encoding="utf-8").splitlines())
