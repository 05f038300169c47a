"""Forward only: inference and evaluation."""

from __future__ import annotations

from shardstage.schedule.action import Action, Schedule
from shardstage.schedule.places import place_stages

__all__ = ["forward_only"]


def forward_only(num_ranks: int, num_microbatches: int, stages_per_rank: int) -> Schedule:
    """All forwards and nothing else; nothing is held for a backward. p = 2, m = 4:

    rank 0 | F0 F1 F2 F3
    rank 1 | .. F0 F1 F2 F3

    With several stages a rank (stage s on rank s mod p), rounds of p microbatches go through all of them, so that the first round's
    outputs come early and a rank waits for none.
    """
    rounds = [
        range(start, min(start + num_ranks, num_microbatches))
        for start in range(0, num_microbatches, num_ranks)
    ]
    return Schedule(
        name="forward-only",
        num_microbatches=num_microbatches,
        stage_ranks=place_stages("loop", num_ranks, stages_per_rank),
        actions=tuple(
            tuple(
                Action(rank + place * num_ranks, "F", m)
                for microbatches in rounds
                for place in range(stages_per_rank)
                for m in microbatches
            )
            for rank in range(num_ranks)
        ),
    )
