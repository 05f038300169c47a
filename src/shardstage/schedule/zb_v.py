"""ZB-V: two stages a rank in the shape of a V, no bubble where F, I and W take equally long."""

from __future__ import annotations

from collections.abc import Iterator

from shardstage.schedule.action import Action, Schedule
from shardstage.schedule.places import place_stages
from shardstage.schedule.rows import Phase, number_row

__all__ = ["zb_v"]


def zb_v(num_ranks: int, num_microbatches: int) -> Schedule:
    """The schedule of Qi et al., "Zero Bubble Pipeline Parallelism", 2023, section 6: rank r runs stages r and 2p - 1 - r.

    p = 2, m = 4; rank 0 runs stages 0 and 3:

    rank 0 | 0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1 0F3 0I0 0W0 3F2 3I2 3W2 0I1 0W1 3F3 3I3 3W3 0I2 0W2 0I3 0W3
    rank 1 | ... 1F0 2F0 1F1 2F1 2I0 2W0 1F2 1I0 1W0 2F2 2I1 2W1 1F3 1I1 1W1 2F3 2I2 2W2 1I2 2I3 1I3 1W2 2W3 1W3

    The last stage sits where the first does, so the first backward comes back early. Activations of at most 2p pairs (stage,
    microbatch), half a rank's layers each, are held: as much as 1F1B's first rank holds.
    """
    p, m = num_ranks, num_microbatches
    return Schedule(
        name="zb-v",
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
    down = p - rank
    yield 2 * down - 1, "F0"
    yield rank, "F1 F0"
    yield down, "F1 I1 W1"
    yield max(m, 2 * p - 1) - p, "F0 I0 W0 F1 I1 W1"
    yield rank, "I0 I1"
    yield down, "I0 W0"
    yield m, "W1"
    yield m, "W0"
