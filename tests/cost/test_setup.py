"""What a setup derives: a short run of a schedule holds as much as the whole one."""

from __future__ import annotations

import pytest

from shardstage.cost.setup import steady_microbatches
from shardstage.schedule import make_schedule


@pytest.mark.parametrize(
    ("name", "per_rank"),
    [
        *(("1f1b", 1), ("zb-h1", 1), ("zb-v", 2), ("dualpipe-v", 2)),
        *(("interleaved-1f1b", 2), ("interleaved-1f1b", 3), ("interleaved-1f1b", 5)),
    ],
)
@pytest.mark.parametrize("num_ranks", [2, 3, 5, 8])
@pytest.mark.parametrize("left", [0, 1])
def test_a_few_rounds_hold_as_much_as_many(name: str, per_rank: int, num_ranks: int, left: int) -> None:
    held = []
    many = 7 * num_ranks + left
    for num_microbatches in (steady_microbatches(many, num_ranks), many):
        schedule = make_schedule(
            name,
            num_stages=per_rank * num_ranks,
            num_ranks=num_ranks,
            num_microbatches=num_microbatches,
        )
        held.append([schedule.max_held(stage) for stage in range(per_rank * num_ranks)])
    assert held[0] == held[1]
