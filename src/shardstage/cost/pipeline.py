"""``pipeline_s``: when a pipeline of uneven stages is done, by the published formula of its schedule.

    m microbatches, p ranks with v stages each; a stage takes F forward and B = I + W backward, t is what a rank takes for one microbatch

    seconds = m × max t + bubble

    schedule                 bubble (of mean stages)                           source
    gpipe, 1f1b              Σ t - max t                                       Narayanan et al. 2021, §2.2.1, for uneven stages
    interleaved-1f1b         (p - 1)(F + B)                                    Narayanan et al. 2021, §2.2.2
    looped-bfs               (p - 1)(F + B)                                    Lamy-Poirier 2022
    zb-h1                    (p - 1)(F + I - W)                                Qi et al. 2023, table 2
    zb-v, dualpipe-v         (p - 1)(F + I - W), longer where m < 2p           benchmarks/schedules
    forward-only             (p - 1) F

With fewer microbatches than ranks a rank waits longer before its next stage, and there are not enough Ws to fill the bubble with:

    interleaved-1f1b, looped-bfs   + (p - m)(v - 1)(F + B)          benchmarks/schedules
    zb-h1, zb-v, dualpipe-v        + (p - m) v W

1F1B with stages of unlike times: the slowest is busy from the first microbatch's arrival to the last one's departure, and what comes
before and after it passes the other stages once: (m - 1) max t + Σ t. ``benchmarks/schedules`` holds the formulas against the schedules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from shardstage.schedule import Schedule, StageTimes, make_schedule, run_schedule

__all__ = ["StageTime", "halved", "idle_cores_s", "pipeline_s", "rank_seconds", "run_pipeline"]


class StageTime(NamedTuple):
    """Seconds of a stage for one microbatch; ``receive_s`` is the transfer into it from the stage before,
    and of the gradient back; the first stage has none."""

    forward_s: float
    backward_s: float
    receive_s: float = 0.0

    @property
    def both_s(self) -> float:
        return self.forward_s + self.backward_s


def pipeline_s(schedule: str, stages: Sequence[StageTime], num_ranks: int, num_microbatches: int) -> float:
    """Seconds from the first forward to the last backward of a named schedule, the first microbatch's transfers included."""
    p, m = num_ranks, num_microbatches
    ranks = rank_seconds(schedule, stages, p)
    slowest = max(ranks)
    if p == 1:
        return m * slowest
    travel_s = 2 * sum(stage.receive_s for stage in stages[1:p])
    return m * slowest + bubble_s(schedule, stages, p, m) + travel_s


def bubble_s(schedule: str, stages: Sequence[StageTime], num_ranks: int, num_microbatches: int) -> float:
    """Seconds that the slowest rank idles."""
    p, m = num_ranks, num_microbatches
    ranks = rank_seconds(schedule, stages, p)
    forward = sum(stage.forward_s for stage in stages) / len(stages)
    backward = sum(stage.backward_s for stage in stages) / len(stages)
    if schedule in ("gpipe", "1f1b"):
        return sum(ranks) - max(ranks)
    if schedule == "forward-only":
        return (p - 1) * forward
    few, v = max(0, p - m), len(stages) // p
    if schedule in SPLITTING:  # I and W take half of B each: F + I - W = F
        late = LATE_BUBBLES.get(schedule, 0.0) * min(p, max(0, 2 * p - m)) / p
        return (p - 1) * forward * (1 + late) + few * v * backward / 2
    return (p - 1 + few * (v - 1)) * (forward + backward)


def each_bubble_s(
    schedule: str, v: Any, forward: Any, backward: Any, num_ranks: Any, num_microbatches: Any
) -> Any:
    """``bubble_s`` of arrays, where every one of a rank's v stages takes so long; not of 1F1B, whose ranks may differ."""
    p, m = num_ranks, num_microbatches
    few = np.maximum(0.0, p - m)
    if schedule in SPLITTING:
        late = LATE_BUBBLES.get(schedule, 0.0) * np.minimum(p, np.maximum(0.0, 2 * p - m)) / p
        return (p - 1) * forward * (1 + late) + few * v * backward / 2
    return (p - 1 + few * (v - 1)) * (forward + backward)


def idle_cores_s(
    schedule: str, stages: Sequence[StageTime], num_ranks: int, num_microbatches: int, num_cores: float
) -> float:
    """Seconds that each of ``num_cores`` idles while a pipeline fills and drains, whose more ranks share them: the bubble of mean stages
    on as many ranks as there are cores. ``stages`` take what they take a rank alone.
    """
    if num_cores <= 1:
        return 0.0
    mean = StageTime(*(sum(seconds) / len(stages) for seconds in zip(*stages, strict=True)))
    bubble = bubble_s(schedule, [mean] * len(stages), num_ranks, num_microbatches)
    return (num_cores - 1) / (num_ranks - 1) * bubble


SPLITTING: Final = frozenset({"zb-h1", "zb-v", "dualpipe-v"})
LATE_BUBBLES: Final = {"zb-v": 1.0, "dualpipe-v": 2.0}
"""How the bubble grows from 2p microbatches down to p, in its own size: measured on the schedules (``benchmarks/schedules``)."""


def rank_seconds(schedule: str, stages: Sequence[StageTime], num_ranks: int) -> list[float]:
    """What each rank computes for one microbatch: its stages, which lie in rounds or, under a V, there and back."""
    p, last = num_ranks, len(stages) - 1
    seconds = [0.0] * p
    for number, stage in enumerate(stages):
        is_back = schedule in ("zb-v", "dualpipe-v") and number >= p
        seconds[last - number if is_back else number % p] += stage.both_s
    return seconds


def run_pipeline(
    stages: Sequence[StageTime], num_microbatches: int, schedule: str | Schedule, *, num_ranks: int = 0
) -> tuple[float, ...]:
    """When each stage has done its last action under a schedule, or the one of that name on ``num_ranks`` (one for each stage by default).

    Where a schedule cuts backwards in two, the gradients of input and weights take half each: they are products of equally many FLOPs.
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


def halved(stage: StageTime) -> StageTimes:
    half_s = stage.backward_s / 2
    return StageTimes(
        forward_s=stage.forward_s,
        input_s=half_s,
        weight_s=half_s,
        backward_s=stage.backward_s,
        receive_s=stage.receive_s,
    )
