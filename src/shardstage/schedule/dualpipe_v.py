"""DualPipeV: V-shaped, a forward beside every backward."""

from __future__ import annotations

from collections.abc import Iterator

from shardstage.schedule.action import Schedule
from shardstage.schedule.places import place_stages
from shardstage.schedule.rows import Phase, number_row

__all__ = ["dualpipe_v"]


def dualpipe_v(num_ranks: int, num_microbatches: int) -> Schedule:
    """DualPipe (DeepSeek-AI, "DeepSeek-V3", 2024, figure 5) cut in half, a V of two stages a rank (Qi et al., Sea AI Lab, 2025).

    p = 2; microbatches of the rank's second stage in brackets:

        rank 0 | 0 1 2 [0]     i[0] w[0] [1] 3 b[1] ...
        rank 1 |   0 [0] 1 [1] 2 b[0] [2] b0 3 b[1] ...

    In the steady state a forward of one stage stands beside a backward of the other, so that one's communication can hide under the
    other's compute. Only the start and the end cut the backward into i and w. Needs 2p microbatches to be what it is; with fewer, the
    missing ones are left out.
    """
    p, m = num_ranks, num_microbatches
    return Schedule(
        name="dualpipe-v",
        num_microbatches=m,
        stage_ranks=place_stages("v", p, 2),
        actions=tuple(number_row((rank, 2 * p - 1 - rank), m, _phases(rank, p, m)) for rank in range(p)),
    )


def _phases(rank: int, p: int, m: int) -> Iterator[Phase]:
    """Words of the rank's first stage (0) and second (1)."""
    down, up = p - rank - 1, rank + 1
    yield 2 * down, "F0"
    yield up, "F0 F1"
    yield down, "I1 W* F1"
    yield max(m, 2 * p) - 2 * p + up, "F0 B1 F1 B0"
    yield down, "B1 F1 B0"
    # From the middle on, w waits for the last phases: they have nothing else to do.
    yield up // 2, "B1 B0"
    yield up % 2, "B1 I0"
    yield up // 2, "I1 I0"
    yield down, "W* I0"
    yield 2 * m, "W*"
