"""Checkpoints of three real ranks, started once, and what one program then reads of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from tests.checkpoint import rank_cases
from tests.checkpoint.states import WHOLE, assert_filled, blank, entries

from shardstage.checkpoint import load
from shardstage.checkpoint.load import CheckpointReader, find_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the ranks left: their checkpoints, and the outcomes of the cases."""
    folder = tmp_path_factory.mktemp("ranks")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=rank_cases.run_rank, args=(rank, store.port, folder), daemon=True)
        for rank in range(3)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    return folder


@pytest.mark.parametrize("case", [case.__name__ for case in rank_cases.CASES])
@pytest.mark.parametrize("rank", range(3))
def test_on_every_rank(folder: Path, case: str, rank: int) -> None:
    outcomes = json.loads((folder / f"rank{rank}.json").read_text())
    assert outcomes.get(case) == "passed", outcomes.get(case, "not reached: see the first case that failed")


@pytest.mark.parametrize("plan", ["tp3", "dp3"])
def test_one_program_reads_what_three_uneven_ranks_saved(folder: Path, plan: str) -> None:
    loaded = blank(entries(WHOLE, {}, 0))
    load(folder / plan, "latest", loaded)
    assert_filled(loaded, WHOLE)


@pytest.mark.parametrize("plan", ["tp3", "dp3"])
def test_what_several_ranks_hold_is_written_once(folder: Path, plan: str) -> None:
    stored = CheckpointReader(find_checkpoint(folder / plan, "latest")).tensors
    written = {key: sum(box.sizes.numel() for box in tensor.chunks) for key, tensor in stored.items()}
    assert written == {key: tensor.numel() for key, tensor in WHOLE.items()}
