"""1F1B: a backward as soon as there is one, so that few activations are held."""

from __future__ import annotations

from shardstage.schedule.action import Action, Schedule

__all__ = ["one_f_one_b"]


def one_f_one_b(num_stages: int, num_microbatches: int) -> Schedule:
    """PipeDream-Flush (Narayanan et al., 2021, figure 4 top), here with p = 4, m = 6: stage s holds at most p - s microbatches.

    rank 0 | F0 F1 F2 F3 .. .. .. .. .. .. B0 == F4 B1 == F5 B2 == .. B3 == .. B4 == .. B5 ==
    rank 1 | .. F0 F1 F2 .. .. .. .. B0 == F3 B1 == F4 B2 == F5 B3 == .. B4 == .. B5 ==
    rank 2 | .. .. F0 F1 .. .. B0 == F2 B1 == F3 B2 == F4 B3 == F5 B4 == .. B5 ==
    rank 3 | .. .. .. F0 B0 == F1 B1 == F2 B2 == F3 B3 == F4 B4 == F5 B5 ==
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
