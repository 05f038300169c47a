"""GPipe: all forwards, then all backwards."""

from __future__ import annotations

from shardstage.schedule.action import Action, Schedule

__all__ = ["gpipe"]


def gpipe(num_stages: int, num_microbatches: int) -> Schedule:
    """The schedule of Huang et al., "GPipe", 2019, figure 2c, here with p = m = 4; every stage holds the activations of all microbatches.

    rank 0 | F0 F1 F2 F3 .. .. .. .. .. .. .. .. .. B3 == B2 == B1 == B0 ==
    rank 1 | .. F0 F1 F2 F3 .. .. .. .. .. .. B3 == B2 == B1 == B0 ==
    rank 2 | .. .. F0 F1 F2 F3 .. .. .. B3 == B2 == B1 == B0 ==
    rank 3 | .. .. .. F0 F1 F2 F3 B3 == B2 == B1 == B0 ==

    Backwards run in the order of the forwards reversed: the last activations made are the first freed.
    """
    microbatches = range(num_microbatches)
    return Schedule(
        name="gpipe",
        num_microbatches=num_microbatches,
        stage_ranks=tuple(range(num_stages)),
        actions=tuple(
            (
                *(Action(stage, "F", m) for m in microbatches),
                *(Action(stage, "B", m) for m in reversed(microbatches)),
            )
            for stage in range(num_stages)
        ),
    )
