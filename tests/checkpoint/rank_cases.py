"""What the three ranks of ``test_ranks`` do: uneven tensor parallelism, saved, interrupted by a full disk, loaded under another plan."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from tests.checkpoint import states
from tests.checkpoint.states import WHOLE, assert_filled, blank, entries
from torch.distributed.checkpoint.filesystem import FileSystem

from shardstage.checkpoint import latest, load, save
from shardstage.errors import CheckpointError
from shardstage.layout import Shard
from shardstage.runtime.process_group import BACKEND, register_backend

EXTRA = {"position": 12}
LARGE = {**WHOLE, "model.large": torch.zeros(300_000)}
TP_3 = {**states.TP_3, "model.large": Shard(dim=0, sections=((100_000, 100_000, 100_000),))}


def run_rank(rank: int, port: int, folder: Path) -> None:
    """Every case in order, up to the first that fails; outcomes go to ``folder``."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    register_backend()
    dist.init_process_group(BACKEND, store=store, rank=rank, world_size=3, timeout=timedelta(seconds=60))
    outcomes = {}
    try:
        for case in CASES:
            outcomes[case.__name__] = "began"
            case(rank, folder)
            outcomes[case.__name__] = "passed"
    except BaseException:
        outcomes[case.__name__] = traceback.format_exc()
        raise
    finally:
        (folder / f"rank{rank}.json").write_text(json.dumps(outcomes))
    dist.destroy_process_group()
    os._exit(0)  # what autograd still holds of the group would abort an interpreter that shuts down with it


def uneven_shards_are_saved_once(rank: int, folder: Path) -> None:
    save(folder / "tp3", 1, entries(WHOLE, TP_3, rank), EXTRA if rank == 0 else {})
    loaded = blank(entries(WHOLE, TP_3, rank))
    assert load(folder / "tp3", "latest", loaded) == EXTRA
    assert_filled(loaded, WHOLE)


def flat_shards_of_another_plan_are_filled(rank: int, folder: Path) -> None:
    loaded = blank(entries(WHOLE, {}, 0, dp=rank, num_dp=3))
    load(folder / "tp3", 1, loaded)
    assert_filled(loaded, WHOLE)
    save(folder / "dp3", 1, loaded, {})


def a_full_disk_of_one_rank_is_an_error_on_all(rank: int, folder: Path) -> None:
    usual = FileSystem.create_stream

    @contextmanager
    def create_stream(self: FileSystem, path: Path, mode: str) -> Iterator[object]:
        is_full = rank == 2 and path.suffix == ".distcp"
        with usual(self, Path("/dev/full") if is_full else path, mode) as stream:
            yield stream

    with (
        mock.patch.object(FileSystem, "create_stream", create_stream),
        pytest.raises(CheckpointError, match=r"\(rank 2\): .*No space left on device"),
    ):
        save(folder / "tp3", 2, entries(LARGE, TP_3, rank), {})
    assert latest(folder / "tp3") == 1
    save(folder / "tp3", 3, entries(WHOLE, TP_3, rank), EXTRA)
    assert sorted(path.name for path in (folder / "tp3").iterdir()) == ["step-00000001", "step-00000003"]


def a_mismatch_on_one_rank_is_an_error_on_all(rank: int, folder: Path) -> None:
    tensors = {**WHOLE, "model.up.weight": torch.zeros(4, 11)} if rank == 1 else WHOLE
    with pytest.raises(
        CheckpointError, match=r"model.up.weight has shape \(4, 10\), the model wants \(4, 11\)"
    ):
        load(folder / "tp3", "latest", entries(tensors, {}, 0))


def an_entry_that_is_wrong_on_one_rank_is_an_error_on_all(rank: int, folder: Path) -> None:
    found = entries(WHOLE, {}, 0)
    if rank == 1:
        found = [entry for entry in found if entry.tensor.numel() != 1]
        found[0].tensor.resize_(2)
    with pytest.raises(CheckpointError, match=r"\(rank 1\): .* the tensor holds 2 elements, its range 5"):
        save(folder / "wrong", 1, found, {})
    assert latest(folder / "wrong") is None


CASES: tuple[Callable[[int, Path], None], ...] = (
    uneven_shards_are_saved_once,
    flat_shards_of_another_plan_are_filled,
    a_full_disk_of_one_rank_is_an_error_on_all,
    a_mismatch_on_one_rank_is_an_error_on_all,
    an_entry_that_is_wrong_on_one_rank_is_an_error_on_all,
)
