"""ZB-H1: 1F1B whose backward is cut in two, so that weight gradients fill the bubble."""

from __future__ import annotations

from shardstage.schedule.action import Schedule
from shardstage.schedule.places import place_stages
from shardstage.schedule.rows import number_row

__all__ = ["zb_h1"]


def zb_h1(num_ranks: int, num_microbatches: int) -> Schedule:
    """The schedule of Qi et al., "Zero Bubble Pipeline Parallelism", 2023, figure 3: as much memory as 1F1B, a third of its bubble.

        rank 0 | 0 1 2 3       i0 w0 4 i1 w1 5 i2 w2 ...
        rank 1 |   0 1 2    i0 3 i1 w0 4 i2 w1 5 i3 ...
        rank 2 |     0 1 i0 2 i1 3 i2 w0 4 i3 w1 5 ...
        rank 3 |       0 i0 1 i1 2 i2 3 i3 w0 4 i4 w1 ...

    i is the gradient of a stage's input, which the rank before waits for; w, that of its weights, nobody waits for. Rank r runs its w
    r microbatches late: then every rank holds p microbatches, as the first rank of 1F1B does, and the cool-down has w to fill it.
    """
    p, m = num_ranks, num_microbatches
    return Schedule(
        name="zb-h1",
        num_microbatches=m,
        stage_ranks=place_stages("one", p, 1),
        actions=tuple(
            number_row((rank,), m, ((p - rank - 1, "F0"), (rank, "F0 I0"), (m, "F0 I0 W0"), (m, "W0")))
            for rank in range(p)
        ),
    )
