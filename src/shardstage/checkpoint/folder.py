"""The folder of a run's checkpoints, and what a crash may leave in it.

step-00000020/              complete: visible
step-00000040.partial/      being written, being removed, or left by a crash: nobody reads it, the next save removes it
step-00000020.replaced/     complete, for the moment in which step 20, saved again, takes its place
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

__all__ = ["clean", "latest", "partial_path", "publish", "step_paths", "sync_folder"]

_STEP = re.compile(r"step-(\d{8,})(\.replaced)?")


def latest(folder: Path | str) -> int | None:
    """The highest step of which ``folder`` holds a complete checkpoint; None if there is none."""
    return max(step_paths(Path(folder)), default=None)


def step_paths(folder: Path) -> dict[int, Path]:
    """Where each complete checkpoint lies, by step."""
    found: dict[int, Path] = {}
    for path in sorted(
        folder.glob("step-*"), reverse=True
    ):  # "….replaced" comes first, and yields to its successor
        match = _STEP.fullmatch(path.name)
        if match is not None:
            found[int(match.group(1))] = path
    return dict(sorted(found.items()))


def partial_path(folder: Path, step: int) -> Path:
    return folder / f"{_name(step)}.partial"


def clean(folder: Path) -> None:
    """Removes what saves that did not end have left."""
    for path in folder.glob("step-*.partial"):
        shutil.rmtree(path)
    for path in folder.glob("step-*.replaced"):
        successor = path.with_suffix("")
        if successor.exists():
            shutil.rmtree(path)
        else:
            path.rename(successor)


def publish(folder: Path, step: int, *, keep: int) -> None:
    """Makes the partial checkpoint of ``step`` visible at once, then removes the lowest steps beyond ``keep``."""
    final = folder / _name(step)
    replaced = folder / f"{_name(step)}.replaced"
    sync_folder(partial_path(folder, step))
    if final.exists():
        final.rename(replaced)
    partial_path(folder, step).rename(final)
    sync_folder(folder)
    if replaced.exists():
        shutil.rmtree(replaced)
    others = [other for other in step_paths(folder) if other != step]
    for other in others[: max(0, len(others) - (keep - 1))]:
        _remove(folder, other)


def sync_folder(path: Path) -> None:
    """Returns when the names in the folder are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(folder: Path, step: int) -> None:
    """Invisible first, so that what a crash leaves is no broken checkpoint."""
    (folder / _name(step)).rename(partial_path(folder, step))
    shutil.rmtree(partial_path(folder, step))


def _name(step: int) -> str:
    return f"step-{step:08d}"
