"""ZB-V: two stages a rank in the shape of a V, no bubble where F, I and W take equally long."""

from __future__ import annotations

from collections.abc import Iterator

from shardstage.schedule.action import Schedule
from shardstage.schedule.places import place_stages
from shardstage.schedule.rows import Phase, number_row

__all__ = ["zb_v"]


def zb_v(num_ranks: int, num_microbatches: int) -> Schedule:
    """The schedule of Qi et al., "Zero Bubble Pipeline Parallelism", 2023, section 6 and figure 8: rank r runs stages r and 2p - 1 - r.

    p = 2; microbatches of the rank's second stage in brackets:

        rank 0 | 0  1  2      [0] i[0] w[0] [1] i[1] w[1] 3  i0 w0 [2] i[2] w[2] ...
        rank 1 |    0 [0] 1 [1] ...

    The last stage sits where the first does, so the first backward comes back early. Activations of at most 2p pairs (stage,
    microbatch), half a rank's layers each, are held: as much as 1F1B's first rank holds.
    """
    p, m = num_ranks, num_microbatches
    return Schedule(
        name="zb-v",
        num_microbatches=m,
        stage_ranks=place_stages("v", p, 2),
        actions=tuple(number_row((rank, 2 * p - 1 - rank), m, _phases(rank, p, m)) for rank in range(p)),
    )


def _phases(rank: int, p: int, m: int) -> Iterator[Phase]:
    """Words of the rank's first stage (0) and second (1)."""
    down = p - rank
    yield 2 * down - 1, "F0"
    yield rank, "F1 F0"
    yield down, "F1 I1 W1"
    yield max(m, 2 * p - 1) - p, "F0 I0 W0 F1 I1 W1"
    yield rank, "I0 I1"
    yield down, "I0 W0"
    yield m, "W1"
    yield m, "W0"
