"""``pipeline_s``: when a pipeline of uneven stages is done, by the published formula of its schedule.

    m microbatches, p ranks with v stages each; a stage takes F forward and B = I + W backward, of which W, the gradients of weights, can be
    put off; t is what a rank takes for one microbatch, n = p - 1, d = max(0, I - W)

    seconds = m × max t + bubble

    schedule                 bubble (of mean stages)                           source
    gpipe, 1f1b              Σ t - max t                                       Narayanan et al. 2021, §2.2.1, for uneven stages
    interleaved-1f1b         n (F + B)                                         Narayanan et al. 2021, §2.2.2
    looped-bfs               n (F + B)                                         Lamy-Poirier 2022
    zb-h1                    n (F + d)                                         Qi et al. 2023, table 2: F + I - W
    zb-v                     n max(F, 2d): of F = I = W only the start         Qi et al. 2023, §6; benchmarks/schedules
    dualpipe-v               n (max(F, I) + d), where F = I n (F + I - W)      benchmarks/schedules
    forward-only             n F

A W that is longer than I fits into no gap. With few microbatches a rank waits longer before its next stage, and there are not enough Ws
to fill the bubble with (benchmarks/schedules):

    interleaved-1f1b, looped-bfs   m < p     + (p - m)(v - 1)(F + B)
    zb-h1                          m < p     + (p - m) min(I, W)
    zb-v                           m > p     n (I + max(F, I)) - 2 (m - p) W, where that is longer
    dualpipe-v                     m > p     + 2 (2p - m) min(I, W), where m < 2p
    zb-v                           m <= p    n (I + max(F, I)) + (p - m)(F + min(F, I))
    dualpipe-v                     m <= p    n W more than ZB-V

1F1B with stages of unlike times: the slowest is busy from the first microbatch's arrival to the last one's departure, and what comes
before and after it passes the other stages once: (m - 1) max t + Σ t. ``benchmarks/schedules`` holds the formulas against the schedules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from shardstage.schedule import Schedule, StageTimes, make_schedule, run_schedule

__all__ = [
    "StageTime",
    "bubble_s",
    "cut_backward",
    "exposed_talk_s",
    "idle_cores_s",
    "mean_stage",
    "pipeline_s",
    "rank_seconds",
    "run_pipeline",
]


class StageTime(NamedTuple):
    """Seconds of a stage for one microbatch; ``receive_s`` is the transfer into it from the stage before,
    and of the gradient back; the first stage has none. ``weight_s`` of the backward can be put off (W)."""

    forward_s: float
    backward_s: float
    receive_s: float = 0.0
    weight_s: float = 0.0

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
    if schedule in ("gpipe", "1f1b"):
        ranks = rank_seconds(schedule, stages, p)
        return sum(ranks) - max(ranks)
    mean = mean_stage(stages)
    if schedule == "forward-only":
        return (p - 1) * mean.forward_s
    times = (mean.forward_s, mean.backward_s, mean.weight_s)
    return float(each_bubble_s(schedule, len(stages) // p, *times, p, m))


def each_bubble_s(
    schedule: str,
    v: Any,
    forward: Any,
    backward: Any,
    weight: Any,
    num_ranks: Any,
    num_microbatches: Any,
) -> Any:
    """``bubble_s`` of arrays, where every one of a rank's v stages takes so long; not of 1F1B, whose ranks may differ.

    Never less with a longer forward or backward, never more with a longer part of the backward that can be put off.
    """
    p, m = num_ranks, num_microbatches
    few = np.maximum(0, p - m)
    if schedule not in SPLITTING:
        return (p - 1 + few * (v - 1)) * (forward + backward)
    n, input_s = p - 1, backward - weight  # I: what the stage before waits for
    unfilled = np.maximum(0.0, input_s - weight)
    if schedule == "zb-h1":
        return n * (forward + unfilled) + few * np.minimum(input_s, weight)
    longer = np.maximum(forward, input_s)
    of_few = n * (input_s + longer) + few * (forward + np.minimum(forward, input_s))
    if schedule == "zb-v":
        of_many = n * np.maximum(forward, 2 * unfilled)
        return np.maximum(of_many, of_few - 2 * np.maximum(0, m - p) * weight)
    late = 2 * np.maximum(0, 2 * p - m) * np.minimum(input_s, weight)
    return np.where(m <= p, of_few + n * weight, n * (longer + unfilled) + late)


def idle_cores_s(bubble: float, num_ranks: int, num_cores: float) -> float:
    """Seconds that each of ``num_cores`` idles while a pipeline fills and drains, whose more ranks share them: the bubble of mean stages
    on as many ranks as there are cores. ``bubble`` is theirs on all ranks, where a rank computes alone."""
    return max(0.0, num_cores - 1) / (num_ranks - 1) * bubble


def exposed_talk_s(
    talk_s: float, bubble: float, compute_s: float, num_ranks: int, num_microbatches: int
) -> float:
    """Seconds that cores which the ranks of a pipeline share idle because ranks talk, of all microbatches.

    A rank talks for ``talk_s`` a microbatch, and a pipeline of nothing but talk has the ``bubble``: while it fills and drains one rank at a
    time is at work, and nobody computes while it talks. Otherwise others do: a closed queueing network of p ranks that in turn talk and
    want the cores, all of them for ``compute_s`` a microbatch. Its cycle is found by mean value analysis (Reiser, Lavenberg 1980,
    "Mean-Value Analysis of Closed Multichain Queuing Networks").
    """
    if not talk_s:
        return 0.0
    p, m = num_ranks, num_microbatches
    num_waiting, cycle_s = 0.0, 0.0
    for number in range(1, p + 1):
        computing_s = compute_s * (1 + num_waiting)
        cycle_s = computing_s + talk_s
        num_waiting = number * computing_s / cycle_s
    num_lonely = bubble / ((p - 1) * talk_s)
    return num_lonely * p * talk_s + max(0.0, m - num_lonely) * (cycle_s - p * compute_s)


def mean_stage(stages: Sequence[StageTime]) -> StageTime:
    return StageTime(*(sum(seconds) / len(stages) for seconds in zip(*stages, strict=True)))


SPLITTING: Final = frozenset({"zb-h1", "zb-v", "dualpipe-v"})


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
    """When each stage has done its last action under a schedule, or the one of that name on so many ranks: by default as many as stages."""
    if isinstance(schedule, str):
        schedule = make_schedule(
            schedule,
            num_stages=len(stages),
            num_ranks=num_ranks or len(stages),
            num_microbatches=num_microbatches,
        )
    ran = run_schedule(schedule, [cut_backward(stage) for stage in stages])
    last = {
        action.stage: end_s
        for row, ends in zip(schedule.actions, ran.ends_s, strict=True)
        for action, end_s in zip(row, ends, strict=True)
    }
    return tuple(last[stage] for stage in range(len(stages)))


def cut_backward(stage: StageTime) -> StageTimes:
    """The same with the backward's two parts, where a schedule cuts it."""
    return StageTimes(
        forward_s=stage.forward_s,
        input_s=stage.backward_s - stage.weight_s,
        weight_s=stage.weight_s,
        backward_s=stage.backward_s,
        receive_s=stage.receive_s,
    )
