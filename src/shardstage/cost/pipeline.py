"""``run_pipeline``: when the stages of a named schedule are done, priced by stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from shardstage.schedule import Schedule, StageTimes, make_schedule, run_schedule

__all__ = ["StageTime", "halved", "least_pipeline_s", "run_pipeline"]


class StageTime(NamedTuple):
    """Seconds of a stage for one microbatch; ``receive_s`` is the transfer into it from the stage before,
    and of the gradient back; the first stage has none."""

    forward_s: float
    backward_s: float
    receive_s: float = 0.0


def run_pipeline(
    stages: Sequence[StageTime], num_microbatches: int, schedule: str | Schedule, *, num_ranks: int = 0
) -> tuple[float, ...]:
    """When each stage has done its last action under a schedule, or the one of that name on ``num_ranks`` (one for each stage by default).

    With equal stages and no transfers 1F1B and GPipe end at (m + p - 1)(forward + backward) (Narayanan et al., 2021, §2.2). Where a
    schedule cuts backwards in two, the gradients of input and weights take half each: they are products of equally many FLOPs.
    """
    if isinstance(schedule, str):
        schedule = make_schedule(
            schedule,
            num_stages=len(stages),
            num_ranks=num_ranks or len(stages),
            num_microbatches=num_microbatches,
        )
    ran = run_schedule(schedule, [halved(stage) for stage in stages])
    last = {
        action.stage: end_s
        for row, ends in zip(schedule.actions, ran.ends_s, strict=True)
        for action, end_s in zip(row, ends, strict=True)
    }
    return tuple(last[stage] for stage in range(len(stages)))


def least_pipeline_s(stages: Sequence[StageTime], num_microbatches: int) -> float:
    """A lower bound on any schedule's end: each stage does all its work after what must come before, and before what must come after.

    Holds for schedules that run one stage on each rank and do not cut backwards in two.
    """
    before = after = bound = 0.0
    for number, stage in enumerate(stages):
        before += stage.receive_s if number else 0.0
        after += stage.receive_s if number else 0.0
        bound = max(bound, before + num_microbatches * (stage.forward_s + stage.backward_s) + after)
        before += stage.forward_s
        after += stage.backward_s
    return bound


def halved(stage: StageTime) -> StageTimes:
    half_s = stage.backward_s / 2
    return StageTimes(
        forward_s=stage.forward_s,
        input_s=half_s,
        weight_s=half_s,
        backward_s=stage.backward_s,
        receive_s=stage.receive_s,
    )
