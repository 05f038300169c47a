"""Looped breadth-first: all microbatches through each of a rank's stages, then back."""

from __future__ import annotations

from shardstage.schedule.action import Action, Schedule
from shardstage.schedule.places import place_stages

__all__ = ["looped_bfs"]


def looped_bfs(num_ranks: int, num_microbatches: int, stages_per_rank: int) -> Schedule:
    """The schedule of Lamy-Poirier, "Breadth-First Pipeline Parallelism", 2022: stage s on rank s mod p.

    p = 2, v = 2, m = 3; rank 0 runs stages 0 and 2:

    rank 0 | 0F0 0F1 0F2 2F0 2F1 2F2 ... ... ... 2B2 === 2B1 === 2B0 === 0B2 === 0B1 === 0B0 ===
    rank 1 | ... 1F0 1F1 1F2 3F0 3F1 3F2 3B2 === 3B1 === 3B0 === 1B2 === 1B1 === 1B0 ===

    A stage's weights are needed, and its gradients complete, for one stretch of time: sharded data parallelism gathers and reduces each
    once a step. It holds the activations of all microbatches, as GPipe does, with v times less bubble.
    """
    microbatches = range(num_microbatches)
    places = range(stages_per_rank)
    return Schedule(
        name="looped-bfs",
        num_microbatches=num_microbatches,
        stage_ranks=place_stages("loop", num_ranks, stages_per_rank),
        actions=tuple(
            (
                *(Action(rank + v * num_ranks, "F", m) for v in places for m in microbatches),
                *(
                    Action(rank + v * num_ranks, "B", m)
                    for v in reversed(places)
                    for m in reversed(microbatches)
                ),
            )
            for rank in range(num_ranks)
        ),
    )
