"""Looped breadth-first: all microbatches through each of a rank's stages, then back."""

from __future__ import annotations

from shardstage.schedule.action import Action, Schedule
from shardstage.schedule.places import place_stages

__all__ = ["looped_bfs"]


def looped_bfs(num_ranks: int, num_microbatches: int, stages_per_rank: int) -> Schedule:
    """The schedule of Lamy-Poirier, "Breadth-First Pipeline Parallelism", 2022, figure 4: stage s on rank s mod p.

    p = 2, v = 2, m = 3; microbatches of the rank's second stage in brackets:

        rank 0 | 0  1  2 [0][1][2]              b[2]b[1]b[0] b2 b1 b0
        rank 1 |    0  1  2 [0][1][2] b[2]b[1]b[0] b2 b1 b0

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
