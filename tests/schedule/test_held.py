"""What ranks hold, by formula and along one row, against the whole schedule run action by action."""

from __future__ import annotations

import numpy as np
import pytest

from shardstage.schedule import (
    SCHEDULES,
    Schedule,
    held_by_stage,
    held_in_rounds,
    held_together,
    make_schedule,
    stages_of_rank,
    steady_microbatches,
)

PER_RANK = [
    *(("gpipe", 1), ("1f1b", 1), ("zb-h1", 1), ("zb-v", 2), ("dualpipe-v", 2)),
    *(("interleaved-1f1b", 2), ("interleaved-1f1b", 3), ("looped-bfs", 2), ("interleaved-1f1b", 1)),
]


def moments(schedule: Schedule, rank: int) -> set[tuple[int, ...]]:
    """Held on each of a rank's stages after each of its actions, counted pair by pair."""
    stages = schedule.stages_of(rank)
    halves: dict[tuple[int, int], int] = {}
    found = set()
    for action in schedule.actions[rank]:
        pair = (action.stage, action.microbatch)
        halves[pair] = halves.get(pair, 0) + {"F": 0, "B": 2, "I": 1, "W": 1}[action.kind]
        found.add(tuple(sum(half < 2 for (s, _), half in halves.items() if s == stage) for stage in stages))
    return found


@pytest.mark.parametrize(("name", "per_rank"), PER_RANK)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("num_microbatches", [1, 2, 3, 5, 7, 10, 13])
def test_what_is_held_is_what_the_schedule_holds(
    name: str, per_rank: int, num_ranks: int, num_microbatches: int
) -> None:
    num_stages = per_rank * num_ranks
    schedule = make_schedule(
        name, num_stages=num_stages, num_ranks=num_ranks, num_microbatches=num_microbatches
    )
    sizes = {"num_stages": num_stages, "num_ranks": num_ranks, "num_microbatches": num_microbatches}
    for rank in range(num_ranks):
        stages = stages_of_rank(name, num_stages, num_ranks, rank)
        assert stages == schedule.stages_of(rank)
        together = held_together(name, **sizes, rank=rank)
        seen = moments(schedule, rank)
        assert set(together) <= seen
        assert all(any(all(x <= y for x, y in zip(m, t, strict=True)) for t in together) for m in seen)
    for stage in range(num_stages):
        assert held_by_stage(name, **sizes, stage=stage) == schedule.max_held(stage)


def test_a_rank_of_forwards_only_holds_one_at_a_time() -> None:
    found = held_together("forward-only", num_stages=4, num_ranks=2, num_microbatches=3, rank=0)
    assert set(found) == {(1, 0), (0, 1)}


@pytest.mark.parametrize("name", [name for name, kind in SCHEDULES.items() if kind.row is not None])
def test_a_row_alone_is_the_one_of_the_schedule(name: str) -> None:
    for num_ranks, num_microbatches in ((1, 4), (3, 7), (4, 4)):
        whole = make_schedule(
            name, num_stages=2 * num_ranks, num_ranks=num_ranks, num_microbatches=num_microbatches
        )
        row = SCHEDULES[name].row
        assert row is not None
        rows = [row(rank, num_ranks, num_microbatches, 2) for rank in range(num_ranks)]
        assert tuple(rows) == whole.actions


@pytest.mark.parametrize(
    ("name", "per_rank"), [pair for pair in PER_RANK if pair[0] not in ("gpipe", "looped-bfs")]
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


@pytest.mark.parametrize(("p", "v"), [(2, 2), (3, 2), (4, 3), (5, 4)])
def test_what_a_rank_holds_before_its_first_backward_is_one_of_its_fullest_moments(p: int, v: int) -> None:
    for m in range(1, 4 * p + 3):
        for rank in range(p):
            moments = held_together(
                "interleaved-1f1b", num_stages=p * v, num_ranks=p, num_microbatches=m, rank=rank
            )
            assert tuple(held_in_rounds(p, m, v, rank, np.arange(v))) in moments
