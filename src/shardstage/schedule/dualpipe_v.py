"""DualPipeV: V-shaped, a forward beside every backward."""

from __future__ import annotations

from collections.abc import Iterator

from shardstage.schedule.action import Action, Schedule
from shardstage.schedule.places import place_stages
from shardstage.schedule.rows import Phase, number_row

__all__ = ["dualpipe_v"]


def dualpipe_v(num_ranks: int, num_microbatches: int) -> Schedule:
    """DualPipe (DeepSeek-AI, "DeepSeek-V3", 2024, figure 5) cut in half, a V of two stages a rank (Qi et al., Sea AI Lab, 2025).

    p = 2, m = 5; rank 0 runs stages 0 and 3:

    rank 0 | 0F0 0F1 0F2 3F0 3I0 3W0 3F1 0F3 3B1 === 3F2 0B0 === 0F4 3B2 === 3F3 0B1 === 3B3 === 3F4 ... 0B2 === 3B4 === 0I3 0W3…
    rank 1 | ... 1F0 2F0 1F1 2F1 1F2 2B0 === 2F2 1B0 === 1F3 2B1 === 2F3 1B1 === 1F4 2B2 === 2F4 1B2 === 2B3 === 1B3 === 2I4 1I4…

    In the steady state a forward of one stage stands beside a backward of the other, so that one's communication can hide under the
    other's compute. Only the start and the end cut the backward into I and W. Needs 2p microbatches to be what it is; with fewer, the
    missing ones are left out.
    """
    p, m = num_ranks, num_microbatches
    return Schedule(
        name="dualpipe-v",
        num_microbatches=m,
        stage_ranks=place_stages("v", p, 2),
        actions=tuple(_row(rank, p, m) for rank in range(p)),
    )


def _row(rank: int, num_ranks: int, num_microbatches: int) -> tuple[Action, ...]:
    """What one rank does."""
    stages = (rank, 2 * num_ranks - 1 - rank)
    return number_row(stages, num_microbatches, _phases(rank, num_ranks, num_microbatches))


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
