"""Interleaved 1F1B: several stages a rank, so that a microbatch passes the ranks in smaller steps."""

from __future__ import annotations

from itertools import pairwise

from shardstage.schedule.action import Action, Schedule
from shardstage.schedule.places import place_stages

__all__ = ["interleaved_1f1b", "interleaved_1f1b_row"]


def interleaved_1f1b(num_ranks: int, num_microbatches: int, stages_per_rank: int) -> Schedule:
    """The schedule of Narayanan et al., 2021, figure 4 bottom: stage s on rank s mod p; v stages a rank divide the bubble by v.

    p = 2, v = 2, m = 4; rank 0 runs stages 0 and 2:

    rank 0 | 0F0 0F1 2F0 2F1 0F2 ... 2B0 === 0F3 2B1 === 2F2 0B0 === 2F3 0B1 === ... 2B2 === ... 2B3 === 0B2 === 0B3 ===
    rank 1 | ... 1F0 1F1 3F0 3B0 === 3F1 3B1 === 1F2 1B0 === 1F3 1B1 === 3F2 3B2 === 3F3 3B3 === 1B2 === 1B3 ===

    Microbatches go in rounds of p: a rank runs a round through one of its stages, then through its next one. Where p does not divide
    m, the rounds are fewer and larger, as even as they can be, so that none is shorter than the pipeline.
    """
    return Schedule(
        name="interleaved-1f1b",
        num_microbatches=num_microbatches,
        stage_ranks=place_stages("loop", num_ranks, stages_per_rank),
        actions=tuple(
            interleaved_1f1b_row(rank, num_ranks, num_microbatches, stages_per_rank)
            for rank in range(num_ranks)
        ),
    )


def interleaved_1f1b_row(
    rank: int, num_ranks: int, num_microbatches: int, stages_per_rank: int
) -> tuple[Action, ...]:
    """What one rank does: forwards until the first backward can have come back, then one of each.

    Backwards take a rank's stages from the last.
    """
    order = _order(num_ranks, num_microbatches, stages_per_rank)
    largest_round = -(-num_microbatches // max(1, num_microbatches // num_ranks))
    forwards = [Action(rank + place * num_ranks, "F", m) for place, m in order]
    last = stages_per_rank - 1
    backwards = [Action(rank + (last - place) * num_ranks, "B", m) for place, m in order]
    warm_up = min(len(order), 2 * (num_ranks - rank - 1) + last * largest_round)
    row = forwards[:warm_up]
    for forward, backward in zip(forwards[warm_up:], backwards, strict=False):
        row += [forward, backward]
    return tuple(row + backwards[len(order) - warm_up :])


def _order(num_ranks: int, num_microbatches: int, stages_per_rank: int) -> list[tuple[int, int]]:
    """(which of a rank's stages, microbatch) in the order of the forwards."""
    num_rounds = max(1, num_microbatches // num_ranks)
    starts = [num_microbatches * number // num_rounds for number in range(num_rounds + 1)]
    return [
        (place, microbatch)
        for start, stop in pairwise(starts)
        for place in range(stages_per_rank)
        for microbatch in range(start, stop)
    ]
