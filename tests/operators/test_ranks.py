"""Three real ranks compute what one process does, dropout included: started once for all questions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from tests.operators.rank_cases import NUM_RANKS, run_rank
from tests.sharding.cases import case
from tests.sharding.lockstep import POSITIONS, Outcome, assert_same, put_together

from shardstage.sharding import shard

QUESTIONS = {
    "llama": ("llama", False, True),
    "llama-sp": ("llama", True, True),
    "gpt2": ("gpt2", False, False),
    "gpt2-sp": ("gpt2", True, True),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[object]]:
    """By question: what each rank answers."""
    folder = tmp_path_factory.mktemp("ranks")
    for name, (family, is_sequence_parallel, may_overwrite) in QUESTIONS.items():
        given = case(family)
        sharding = shard(given.graph, num_ranks=NUM_RANKS, is_sequence_parallel=is_sequence_parallel)
        question = (sharding, dict(given.state), dict(given.batch), POSITIONS, may_overwrite)
        torch.save(question, folder / f"{name}.question")
    start_ranks(folder)
    return functools.partial(answers_in, folder)


def start_ranks(folder: Path) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=run_rank, args=(r, store.port, folder), daemon=True) for r in range(NUM_RANKS)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [0] * NUM_RANKS


def answers_in(folder: Path, question: str) -> list[object]:
    return [torch.load(folder / f"{question}.{rank}.answer", weights_only=False) for rank in range(NUM_RANKS)]


@pytest.mark.parametrize("question", QUESTIONS)
def test_ranks_agree_with_one_process(answers: Callable[[str], list[object]], question: str) -> None:
    family, is_sequence_parallel, _ = QUESTIONS[question]
    given = case(family)
    sharding = shard(given.graph, num_ranks=NUM_RANKS, is_sequence_parallel=is_sequence_parallel)
    found = answers(question)
    losses = [part.pop("loss") for part in found]
    assert losses == [losses[0]] * NUM_RANKS
    assert_same(Outcome(loss=losses[0], gradients=put_together(found, sharding)), given.whole)


def test_uneven_parts_move_as_their_sections_say(answers: Callable[[str], list[object]]) -> None:
    assert answers("moves") == [[]] * NUM_RANKS
