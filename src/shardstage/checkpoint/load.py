"""``load``: fills the memory of entries from a checkpoint, however it was cut when it was saved."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import Metadata, TensorStorageMetadata

from shardstage.checkpoint.agreement import agree, gathered, on_first
from shardstage.checkpoint.box_planners import BoxLoadPlanner
from shardstage.checkpoint.entry import StateEntry
from shardstage.checkpoint.folder import step_paths
from shardstage.checkpoint.save import EXTRA_FILE, FORMAT
from shardstage.errors import CheckpointError

__all__ = ["CheckpointReader", "find_checkpoint", "load"]


def load(
    folder: str | Path,
    step: int | Literal["latest"],
    entries: Iterable[StateEntry],
    *,
    group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Fills the tensors of ``entries`` in place and returns the ``extra`` that was saved; collective over ``group``.

    The ranks may hold the tensors otherwise than those that saved them. Raises CheckpointError on all ranks where there is no such
    checkpoint, where it cannot be read, or where keys or shapes are another model's; tensors may then be half filled.
    """
    entries = list(entries)
    path = on_first(lambda: find_checkpoint(Path(folder), step), group, what=f"{folder} cannot be read")
    what = f"the checkpoint {path} cannot be read"
    asked = set().union(*gathered({entry.key for entry in entries}, group))

    def fill() -> dict[str, Any]:
        reader = CheckpointReader(path)
        reader.check(entries, asked)
        reader.read(entries)
        return reader.extra

    return agree(fill, group, what=what)


def find_checkpoint(folder: Path, step: int | Literal["latest"]) -> Path:
    """The folder of a complete checkpoint. Raises CheckpointError where there is none."""
    found = step_paths(folder)
    if not found:
        raise CheckpointError(f"there is no complete checkpoint in {folder}", hint="start without resuming")
    wanted = max(found) if step == "latest" else step
    if wanted not in found:
        raise CheckpointError(
            f"{folder} has no checkpoint of step {wanted}", hint=f"one of {', '.join(map(str, found))}"
        )
    return found[wanted]


class CheckpointReader:
    """One complete checkpoint; its index is read once, tensors as they are asked for. Not collective."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files = _IndexedFiles(path)

    @cached_property
    def extra(self) -> dict[str, Any]:
        """What was saved beside the tensors."""
        content = json.loads((self.path / EXTRA_FILE).read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise CheckpointError(
                f"{self.path} has format {content['format']}, this version reads {FORMAT}",
                hint="pip install --upgrade shardstage",
            )
        extra: dict[str, Any] = content["extra"]
        return extra

    @cached_property
    def tensors(self) -> Mapping[str, TensorStorageMetadata]:
        """Shape and dtype of every stored tensor."""
        stored = self._files.read_metadata().state_dict_metadata
        return {key: tensor for key, tensor in stored.items() if isinstance(tensor, TensorStorageMetadata)}

    def check(self, entries: Sequence[StateEntry], asked: set[str]) -> None:
        """Raises CheckpointError unless the stored tensors are those of ``asked`` (the keys of all ranks) in the shapes of ``entries``.

        Kinds of tensors that nobody asks for, such as ``optimizer.…``, may be there.
        """
        kinds = {_kind(key) for key in asked}
        foreign = sorted(key for key in self.tensors.keys() - asked if _kind(key) in kinds)
        for keys, fault in ((sorted(asked - self.tensors.keys()), "lacks"), (foreign, "has also")):
            if keys:
                names = ", ".join(keys[:3]) + (", …" if len(keys) > 3 else "")
                raise _other_model(self.path, f"it {fault} {len(keys)} tensors: {names}")
        for entry in entries:
            stored = tuple(self.tensors[entry.key].size)
            if stored != entry.global_shape:
                raise _other_model(
                    self.path, f"{entry.key} has shape {stored}, the model wants {entry.global_shape}"
                )

    def read(self, entries: Iterable[StateEntry]) -> None:
        """Fills the entries' tensors."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            try:
                dcp.load({}, storage_reader=self._files, planner=BoxLoadPlanner(entries), no_dist=True)
            except dcp.CheckpointException as error:
                cause = error.failures[0][0]
                raise cause from None


class _IndexedFiles(dcp.FileSystemReader):
    """Reads the index once, for however many loads."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._index: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._index is None:
            try:
                self._index = super().read_metadata(*args, **kwargs)
            except (OSError, EOFError, pickle.UnpicklingError) as error:
                raise CheckpointError(
                    f"the index of {self.path} cannot be read: {error}", hint="resume from an earlier step"
                ) from error
        return self._index


def _other_model(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is of another model: {why}",
        hint="resume with the model and the optimizer that the checkpoint was made with, or start in another folder",
    )


def _kind(key: str) -> str:
    return key.partition(".")[0]
