"""Folders as a training run leaves them, without the run."""

from __future__ import annotations

import json
from pathlib import Path

from tests.training.models import TINY

from shardstage.data import DataConfig
from shardstage.training import RunConfig
from shardstage.training.folder import RunFolder
from shardstage.training.prepare import prepare

__all__ = ["log_steps", "run_folder"]


def run_folder(
    path: Path,
    *,
    plan: str = "dp=2",
    ranks: int = 2,
) -> Path:
    """A folder whose run logged two steps of warm-up and three of 0.1 s to 0.3 s."""
    text = path.with_suffix(".txt")
    text.write_text("all work and no play makes a dull text. " * 20)
    config = RunConfig(
        model=TINY,
        plan=plan,
        ranks=ranks,
        global_batch=4,
        data=DataConfig(sequence=16, paths=(str(text),)),
        out=str(path),
    )
    prepare(config, num_ranks=ranks, cluster=None, folder=path)
    log_steps(path, 9.0, 8.0, 0.3, 0.1, 0.2)
    RunFolder(path=path).summary.write_text(json.dumps({"device_kind": "cpu", "device": "Some CPU"}))
    return path


def log_steps(folder: Path, *steps_s: float) -> None:
    """Replaces the log of a run by one of steps of so many seconds."""
    lines = [json.dumps({"step": step, "step_time_s": seconds}) for step, seconds in enumerate(steps_s)]
    RunFolder(path=folder).log.write_text("".join(f"{line}\n" for line in lines))
