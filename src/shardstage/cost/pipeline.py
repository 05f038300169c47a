"""``run_pipeline``: when the stages of a schedule act, each as soon as it is free and has what it needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from shardstage.schedule import SCHEDULES

__all__ = ["StageTime", "least_pipeline_s", "run_pipeline"]


class StageTime(NamedTuple):
    """Seconds of a stage for one microbatch; ``receive_s`` is the transfer into it from the stage before,
    and of the gradient back; the first stage has none."""

    forward_s: float
    backward_s: float
    receive_s: float = 0.0


def run_pipeline(stages: Sequence[StageTime], num_microbatches: int, schedule: str) -> tuple[float, ...]:
    """When each stage has done its last action. The recurrence, with f and b the ends of a stage's acts on microbatch i:

    f[s, i] = max(free[s], f[s - 1, i] + receive[s]) + forward[s]
    b[s, i] = max(free[s], b[s + 1, i] + receive[s + 1]) + backward[s]

    With equal stages and no transfers 1F1B and GPipe end at (m + p - 1)(forward + backward) (Narayanan et al., 2021, §2.2).
    """
    rows = SCHEDULES[schedule](len(stages), num_microbatches).actions
    free = [0.0] * len(stages)
    done: dict[tuple[int, str, int], float] = {}
    at = [0] * len(stages)
    waiting = list(range(len(stages)))
    while waiting:
        stage = waiting.pop()
        while at[stage] < len(rows[stage]):
            action = rows[stage][at[stage]]
            ready = _ready(stages, done, stage, action.kind, action.microbatch)
            if ready is None:
                break
            took = stages[stage].forward_s if action.kind == "F" else stages[stage].backward_s
            free[stage] = max(free[stage], ready) + took
            done[stage, action.kind, action.microbatch] = free[stage]
            at[stage] += 1
            waiting.append(stage + 1 if action.kind == "F" and stage + 1 < len(stages) else max(stage - 1, 0))
    return tuple(free)


def least_pipeline_s(stages: Sequence[StageTime], num_microbatches: int) -> float:
    """A lower bound on any schedule's end: each stage does all its work after what must come before, and before what must come after."""
    before = after = bound = 0.0
    for number, stage in enumerate(stages):
        before += stage.receive_s if number else 0.0
        after += stage.receive_s if number else 0.0
        bound = max(bound, before + num_microbatches * (stage.forward_s + stage.backward_s) + after)
        before += stage.forward_s
        after += stage.backward_s
    return bound


def _ready(
    stages: Sequence[StageTime],
    done: dict[tuple[int, str, int], float],
    stage: int,
    kind: str,
    microbatch: int,
) -> float | None:
    """When the input of an action has arrived; ``None`` while it is not known."""
    if kind == "F":
        if stage == 0:
            return 0.0
        made = done.get((stage - 1, "F", microbatch))
        return None if made is None else made + stages[stage].receive_s
    if stage == len(stages) - 1:
        return done.get((stage, "F", microbatch))
    made = done.get((stage + 1, "B", microbatch))
    return None if made is None else made + stages[stage + 1].receive_s
