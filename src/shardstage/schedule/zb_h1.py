"""ZB-H1: 1F1B whose backward is cut in two, so that weight gradients fill the bubble."""

from __future__ import annotations

from shardstage.schedule.action import Schedule
from shardstage.schedule.places import place_stages
from shardstage.schedule.rows import number_row

__all__ = ["zb_h1"]


def zb_h1(num_ranks: int, num_microbatches: int) -> Schedule:
    """The schedule of Qi et al., "Zero Bubble Pipeline Parallelism", 2023, figure 3 top, here with p = 4, m = 6: as much memory as 1F1B.

    rank 0 | F0 F1 F2 F3 .. .. .. I0 W0 F4 I1 W1 F5 I2 W2 I3 W3 I4 W4 I5 W5
    rank 1 | .. F0 F1 F2 .. .. I0 F3 I1 W0 F4 I2 W1 F5 I3 W2 I4 W3 I5 W4 W5
    rank 2 | .. .. F0 F1 .. I0 F2 I1 F3 I2 W0 F4 I3 W1 F5 I4 W2 I5 W3 W4 W5
    rank 3 | .. .. .. F0 I0 F1 I1 F2 I2 F3 I3 W0 F4 I4 W1 F5 I5 W2 W3 W4 W5

    The rank before waits for I, nobody waits for W. Rank r runs its W r microbatches late: then every rank holds p microbatches, as the
    first rank of 1F1B does, and the cool-down has W to fill it. Of 1F1B's bubble a third is left where F, I and W take equally long.
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
