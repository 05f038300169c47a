"""``train_rank``: what every rank of a training run does."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from shardstage import checkpoint
from shardstage.cluster.machine import cpu_model
from shardstage.data import BatchSampler, RankBatches, SampleSource
from shardstage.errors import CheckpointError
from shardstage.runtime.build import build_engine
from shardstage.runtime.engine import Engine, StepResult
from shardstage.runtime.environment import RankEnvironment, join_world
from shardstage.runtime.peak_memory import PeakMemory
from shardstage.runtime.recorder import Recorder
from shardstage.training.folder import RunFolder, replace_text
from shardstage.training.job import TrainJob, source_of
from shardstage.training.progress import Progress
from shardstage.training.run_config import RunConfig
from shardstage.training.samples import samples_of
from shardstage.training.state import accept_loaded, kept_bytes, state_entries
from shardstage.training.timelines import begin_recording, write_measured_timeline

__all__ = ["join_job", "rank_batches", "train_joined", "train_rank"]

WARM_UP_STEPS = 2
"""Steps left out of the median step time: allocators, caches and lazy initialisation of libraries settle in them."""


def train_rank(environment: RankEnvironment, job: TrainJob) -> None:
    """Trains, logs and checkpoints; rank 0 draws the progress bar and writes ``summary.json``."""
    train_joined(environment, job, join_job(environment, job.config))


def train_joined(environment: RankEnvironment, job: TrainJob, device: torch.device) -> None:
    """``train_rank`` of a rank that is in the world already."""
    source = source_of(job.config)
    data = samples_of(job.config.data, source)
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
    batches = rank_batches(job, engine, data)
    first_step = _resume(engine, batches, job) if job.config.resume else 0
    measured = _train(engine, batches, job, first_step)
    _write_summary(engine, job, measured)
    if measured.recorder is not None:
        write_measured_timeline(engine, measured.recorder, job)


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


def rank_batches(job: TrainJob, engine: Engine, data: SampleSource) -> RankBatches:
    """This rank's share of every global batch; ranks that differ only in pp and tp read the same samples."""
    plan, dp = job.plan, engine.groups.dp
    sampler = BatchSampler(num_samples=data.num_samples, global_batch=plan.global_batch, seed=job.config.seed)
    start = sum(plan.shares[:dp])
    return RankBatches(
        data, sampler, share=range(start, start + plan.shares[dp]), microbatches=plan.microbatches(dp)
    )


@dataclass(kw_only=True)
class _Measured:
    """What one rank measured of its steps."""

    memory: PeakMemory
    step_times_s: list[float] = field(default_factory=list)
    recorder: Recorder | None = None


def _train(engine: Engine, batches: RankBatches, job: TrainJob, first_step: int) -> _Measured:
    config = job.config
    is_first = engine.groups.rank == 0
    log = _Log(RunFolder(path=Path(job.folder)), first_step) if is_first else None
    measured = _Measured(memory=PeakMemory(engine.device))
    measured.memory.begin(kept_bytes(engine))
    with Progress(config, job.plan, first_step, is_shown=is_first) as progress:
        for step in range(first_step, config.steps):
            if step == config.steps - 1:
                measured.recorder = begin_recording(engine)
            started_s = time.perf_counter()
            result = engine.step(step, batches.step(step))
            elapsed_s = time.perf_counter() - started_s
            measured.memory.observe()
            measured.step_times_s.append(elapsed_s)
            progress.advance(step, result, elapsed_s)
            if log is not None:
                log.write(step, result, elapsed_s)
            is_saved = config.is_checkpoint_due(step + 1)
            if is_saved:
                _save(engine, batches, job, step + 1)
            if is_saved or step == first_step:
                measured.memory.begin(kept_bytes(engine))
    return measured


def _save(engine: Engine, batches: RankBatches, job: TrainJob, step: int) -> None:
    checkpoint.save(
        RunFolder(path=Path(job.folder)).checkpoints,
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
    extra = checkpoint.load(RunFolder(path=Path(job.folder)).checkpoints, "latest", state_entries(engine))
    if extra["graph_fingerprint"] != job.plan.graph_fingerprint:
        raise CheckpointError(
            f"the checkpoints in {job.folder} are of another model: {extra['model']}",
            hint=f"--model {extra['model']}",
        )
    accept_loaded(engine, num_steps=int(extra["step"]))
    batches.load_state_dict(extra["data"])
    return int(extra["step"])


class _Log:
    """``log.jsonl``: one line a step, written at once.

    Steps from ``first_step`` on that a run logged after its last checkpoint, and before it was killed, are done again: their lines go.
    """

    def __init__(self, folder: RunFolder, first_step: int) -> None:
        self._path = folder.log
        kept = [line for line in folder.log_lines() if line["step"] < first_step]
        try:
            replace_text(self._path, "".join(f"{json.dumps(line)}\n" for line in kept))
        except OSError as error:
            raise self._unwritable(error) from error

    def write(self, step: int, result: StepResult, elapsed_s: float) -> None:
        line = {"step": step, **asdict(result), "step_time_s": elapsed_s}
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps(line)}\n")
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"the log {self._path} cannot be written: {error.strerror or error}",
            hint=f"df -h {self._path.parent}",
        )


def _write_summary(engine: Engine, job: TrainJob, measured: _Measured) -> None:
    """Gathers each rank's figures on rank 0, which writes them."""
    step_times_s = measured.step_times_s
    steady = step_times_s[min(WARM_UP_STEPS, max(0, len(step_times_s) - 1)) :]
    mine = {"peak_bytes": measured.memory.peak_bytes, "step_time_s": median(steady) if steady else None}
    everyone = engine.groups.gather(mine)
    if engine.groups.rank:
        return
    folder = RunFolder(path=Path(job.folder))
    lines = list(folder.log_lines())
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
        "device_kind": engine.device.type,
        "device": _device_name(engine.device),
    }
    try:
        replace_text(folder.summary, json.dumps(summary, indent=2) + "\n")
    except OSError as error:
        raise CheckpointError(
            f"{folder.summary} cannot be written: {error.strerror or error}", hint=f"df -h {folder.path}"
        ) from error


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()
