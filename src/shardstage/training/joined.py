"""A run whose ranks somebody else started: torchrun, or srun."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from shardstage.cluster import Cluster
from shardstage.errors import ShardstageError
from shardstage.runtime.environment import RankEnvironment, leave_world
from shardstage.runtime.groups import broadcast_from_first
from shardstage.runtime.rank_entry import EXIT_REFUSED
from shardstage.training.job import TrainJob
from shardstage.training.prepare import prepare
from shardstage.training.rank import join_job, train_joined
from shardstage.training.run_config import RunConfig
from shardstage.training.table import print_plan

__all__ = ["train_as_rank"]

_LAST_WORDS_S = 2.0
"""torchrun ends all ranks when the first one ends: rank 0, which says what is wrong, must be that one."""


def train_as_rank(
    environment: RankEnvironment, config: RunConfig, folder: Path, cluster: Callable[[], Cluster]
) -> None:
    """Rank 0 prepares the job and gives it to all; then every rank trains.

    What rank 0 refuses is raised there and ends the others silently, with the same exit code: it is said once. ``folder`` lies on storage
    that all ranks share; ``cluster`` is asked for only where the plan is to be searched.
    """
    device = join_job(environment, config)
    prepared: TrainJob | ShardstageError | None = None
    if environment.rank == 0:
        try:
            machine = cluster() if config.plan == "auto" and not config.resume else None
            prepared = prepare(config, num_ranks=environment.world_size, cluster=machine, folder=folder)
        except ShardstageError as error:
            prepared = error
    job = broadcast_from_first(prepared)
    if isinstance(job, ShardstageError):
        leave_world()
        if environment.rank == 0:
            raise job
        time.sleep(_LAST_WORDS_S)
        raise SystemExit(EXIT_REFUSED)
    if environment.rank == 0:
        print_plan(Console(highlight=False, emoji=False), job)
    train_joined(environment, job, device)
    leave_world()
