"""1F1B: a backward as soon as there is one, so that few activations are held."""

from __future__ import annotations

from shardstage.schedule.action import Action, Schedule

__all__ = ["one_f_one_b"]


def one_f_one_b(num_stages: int, num_microbatches: int) -> Schedule:
    """PipeDream-Flush (Narayanan et al., 2021, figure 4 top): stage s holds at most ``num_stages - s`` microbatches.

    stage 0 | 0 1 2 3       b0 4 b1 5 b2 6 ...
    stage 1 |   0 1 2    b0 3 b1 4 b2 5 ...
    stage 2 |     0 1 b0 2 b1 3 b2 4 ...
    stage 3 |       0 b0 1 b1 2 b2 3 b3 ...
             warm-up     steady             cool-down
    """
    return Schedule(
        name="1f1b",
        num_microbatches=num_microbatches,
        stage_ranks=tuple(range(num_stages)),
        actions=tuple(_row(stage, num_stages, num_microbatches) for stage in range(num_stages)),
    )


def _row(stage: int, num_stages: int, num_microbatches: int) -> tuple[Action, ...]:
    warm_up = min(num_stages - stage - 1, num_microbatches)
    row = [Action(stage, "F", m) for m in range(warm_up)]
    for m in range(num_microbatches - warm_up):
        row += [Action(stage, "F", warm_up + m), Action(stage, "B", m)]
    row += [Action(stage, "B", m) for m in range(num_microbatches - warm_up, num_microbatches)]
    return tuple(row)
