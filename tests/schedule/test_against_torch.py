"""The schedules of torch.distributed.pipelining as an independent oracle: the same actions in the same order."""

from __future__ import annotations

import pytest
from torch.distributed.pipelining.schedules import get_schedule_class

from shardstage.schedule import make_schedule


def torch_row(kind: str, num_ranks: int, num_stages: int, num_microbatches: int, rank: int) -> str:
    """Actions of a rank. The schedule object is made without the stages and the process group that its constructor asks for."""
    schedule = object.__new__(get_schedule_class(kind))
    schedule.pp_group_size = num_ranks
    schedule._n_microbatches = num_microbatches
    schedule._num_stages = schedule.num_stages = num_stages
    schedule.n_local_stages = num_stages // num_ranks
    schedule._stages = [None] * schedule.n_local_stages
    schedule.number_of_rounds = max(1, num_microbatches // num_ranks)
    schedule.microbatches_per_round = num_microbatches // schedule.number_of_rounds
    actions = [action for action in schedule._calculate_single_rank_operations(rank) if action is not None]
    return " ".join(str(part) for action in actions for part in (action.sub_actions or (action,)))


@pytest.mark.parametrize(
    ("name", "kind", "stages_per_rank"),
    [
        ("looped-bfs", "LoopedBFS", (1, 2, 3)),
        ("interleaved-1f1b", "Interleaved1F1B", (1, 2, 3)),
        ("zb-v", "ZBVZeroBubble", (2,)),
        ("dualpipe-v", "DualPipeV", (2,)),
    ],
)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 7])
def test_a_schedule_is_the_same_as_torch_s(
    name: str, kind: str, stages_per_rank: tuple[int, ...], num_ranks: int
) -> None:
    """torch needs p to divide m where schedules loop, and 2p microbatches for DualPipeV."""
    for num_stages in (num_ranks * stages for stages in stages_per_rank):
        for num_microbatches in (2 * num_ranks, 4 * num_ranks):
            made = make_schedule(
                name, num_stages=num_stages, num_ranks=num_ranks, num_microbatches=num_microbatches
            )
            expected = [torch_row(kind, num_ranks, num_stages, num_microbatches, r) for r in range(num_ranks)]
            assert str(made).splitlines() == expected


@pytest.mark.parametrize("num_microbatches", [1, 2, 5, 7, 9])
def test_zb_v_with_few_microbatches_leaves_out_those_that_torch_does(num_microbatches: int) -> None:
    made = make_schedule("zb-v", num_stages=8, num_ranks=4, num_microbatches=num_microbatches)
    expected = [torch_row("ZBVZeroBubble", 4, 8, num_microbatches, rank) for rank in range(4)]
    assert str(made).splitlines() == expected
