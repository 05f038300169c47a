"""What the ranks of the training tests run: many small runs in one world, for a start of ranks costs more than all of them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from shardstage.runtime.environment import RankEnvironment, leave_world
from shardstage.training.folder import RunFolder
from shardstage.training.job import TrainJob
from shardstage.training.rank import join_job, train_joined

__all__ = ["run_stop_and_resume"]

STEPS, STOP = 6, 4


def run_stop_and_resume(environment: RankEnvironment, jobs: tuple[TrainJob, ...]) -> None:
    """Each job at once in its folder; and beside it, in ``<folder>-resumed``, stopped after ``STOP`` steps and taken up again.

    What is left of the stopped run is made to look like one that was killed between two checkpoints: two steps later than its last one.
    """
    device = join_job(environment, jobs[0].config)
    for job in jobs:
        train_joined(environment, job, device)
        resumed = Path(f"{job.folder}-resumed")
        resumed.mkdir(exist_ok=True)
        stopped = replace(job, folder=str(resumed), config=replace(job.config, steps=STOP))
        train_joined(environment, stopped, device)
        if environment.rank == 0:
            _pretend_it_was_killed_later(RunFolder(path=Path(job.folder)), RunFolder(path=resumed))
        train_joined(environment, replace(stopped, config=replace(job.config, resume=True)), device)
    leave_world()


def _pretend_it_was_killed_later(whole: RunFolder, stopped: RunFolder) -> None:
    lines = whole.log.read_text().splitlines(keepends=True)
    stopped.log.write_text("".join(lines[: STOP + 1]) + lines[STOP + 1][:20])
    shutil.rmtree(stopped.checkpoints / f"step-{STOP:08d}")
