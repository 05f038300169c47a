"""``save``: a checkpoint that is visible when it is complete, and not before."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from shardstage.checkpoint.agreement import as_checkpoint_error, is_first, on_first
from shardstage.checkpoint.box_planners import BoxSavePlanner
from shardstage.checkpoint.entry import StateEntry
from shardstage.checkpoint.folder import clean, partial_path, publish
from shardstage.errors import CheckpointError

__all__ = ["EXTRA_FILE", "FORMAT", "save"]

EXTRA_FILE = "shardstage.json"
FORMAT = 1
"""Of the files: global tensors by key, and ``EXTRA_FILE`` with this number, the step and what the caller added."""


def save(
    folder: str | Path,
    step: int,
    entries: Iterable[StateEntry],
    extra: Mapping[str, Any],
    *,
    group: dist.ProcessGroup | None = None,
    keep: int = 2,
) -> None:
    """Writes the checkpoint of ``step``; collective over ``group`` (None: the world, or just this program).

    ``folder`` must be the same for all ranks, on a file system that they share. ``extra`` (of the first rank) is whatever JSON can hold:
    data position, plan, fingerprint. The newest ``keep`` checkpoints stay. Raises CheckpointError on all ranks where it cannot be written
    (a full disk, say): the checkpoints before are untouched, no half one is left, and the job may go on.
    """
    folder = Path(folder)
    what = f"the checkpoint of step {step} cannot be written to {folder}"
    partial = partial_path(folder, step)

    def begin() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        clean(folder)
        partial.mkdir()

    def finish() -> None:
        _write_extra(partial / EXTRA_FILE, {"format": FORMAT, "step": step, "extra": dict(extra)})
        publish(folder, step, keep=max(1, keep))

    on_first(begin, group, what=what)
    try:
        _write_tensors(partial, entries, group, what)
        on_first(finish, group, what=what)
    except CheckpointError:
        if is_first(group):
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_tensors(
    partial: Path, entries: Iterable[StateEntry], group: dist.ProcessGroup | None, what: str
) -> None:
    """Writes and syncs every rank's files; torch.distributed.checkpoint raises the errors of any rank on all."""
    writer = _PlainWriter(partial, sync_files=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.save({}, storage_writer=writer, planner=BoxSavePlanner(entries), process_group=group)
    except dcp.CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        if not isinstance(cause, Exception):  # Ctrl-C, an exit
            raise cause from None
        raise as_checkpoint_error(cause, f"{what} (rank {rank})") from error


class _PlainWriter(dcp.FileSystemWriter):
    """Raises the system's own error, such as a full disk: torch.save hides it behind one about its file format."""

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            cause = error.__context__
            if isinstance(cause, OSError):
                raise cause from None
            raise


def _write_extra(path: Path, content: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
