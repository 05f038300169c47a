"""The CPU process group against gloo and arithmetic: three ranks, then two, started once each."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from tests.runtime import process_group_cases as cases

from shardstage.runtime.collectives import CompletedWork

Outcomes = dict[int, dict[str, str]]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Outcomes]:
    """By number of ranks: what became of each case on each rank; the ranks are started at the first question."""
    return functools.cache(lambda size: start_ranks(size, tmp_path_factory.mktemp(f"ranks{size}")))


def start_ranks(size: int, folder: Path) -> Outcomes:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=cases.run_rank, args=(rank, size, store.port, folder), daemon=True)
        for rank in range(size)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    found = {rank: folder / f"rank{rank}.json" for rank in range(size)}
    return {rank: json.loads(path.read_text()) for rank, path in found.items() if path.exists()}


@pytest.mark.parametrize(
    ("size", "case"),
    [(size, case.__name__) for size in (3, 2) for case in cases.cases_for(size)],
    ids=lambda value: f"{value}_ranks" if isinstance(value, int) else value,
)
def test_on_every_rank(outcomes: Callable[[int], Outcomes], size: int, case: str) -> None:
    by_rank = outcomes(size)
    survivors = range(2) if case == cases.a_dead_rank_is_named.__name__ else sorted(by_rank)
    assert survivors, "no rank left an outcome"
    for rank in survivors:
        outcome = by_rank[rank].get(case, "not reached: see the first case that failed")
        assert outcome == "passed", f"rank {rank}: {outcome}"


def test_a_completed_work_is_done_and_holds_its_outputs() -> None:
    work = CompletedWork(["output"])
    assert work.wait() and work.is_completed() and work.is_success()
    assert work.exception() is None
    assert work.result() == work.get_future().value() == ["output"]
