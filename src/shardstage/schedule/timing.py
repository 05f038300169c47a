"""``run_schedule``: when every action of a schedule runs, each as soon as its rank is free and it has what it needs.

    start = max(end of the rank's action before, arrival)        end = start + seconds of the action

    arrival of F of stage s    end of F of stage s - 1, and the transfer into s
               B or I          end of B or I of stage s + 1, and the transfer into s + 1; for the last stage, the end of its own F
               W               nothing arrives: its I was before it on the same rank

Stages next to each other on one rank transfer nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shardstage.errors import ProgramError
from shardstage.schedule.action import ActionKind, Schedule
from shardstage.schedule.check import check_schedule
from shardstage.schedule.events import Step, walk

__all__ = ["ScheduleRun", "StageBytes", "StageTimes", "run_schedule"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StageTimes:
    """Seconds of a stage for one microbatch: F, I and W, and B, which takes as long as both unless ``backward_s`` is given.

    ``receive_s`` is the transfer into the stage from the one before, and of the gradient back; the first stage has none.
    """

    forward_s: float
    input_s: float
    weight_s: float
    backward_s: float | None = None
    receive_s: float = 0.0

    @property
    def whole_backward_s(self) -> float:
        """Seconds of B."""
        return self.input_s + self.weight_s if self.backward_s is None else self.backward_s


@dataclass(frozen=True, kw_only=True, slots=True)
class StageBytes:
    """What a stage holds of a microbatch: ``held_bytes`` from the start of its F; the end of its I frees ``freed_by_input_bytes`` of
    them (negative where I keeps more for W than it frees), the end of its W or B all that is left."""

    held_bytes: int
    freed_by_input_bytes: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleRun:
    """``starts_s[r][i]`` and ``ends_s[r][i]`` are of action i of rank r; ``peak_bytes[r]`` is the most that rank r holds."""

    starts_s: tuple[tuple[float, ...], ...]
    ends_s: tuple[tuple[float, ...], ...]
    peak_bytes: tuple[int, ...]

    @property
    def makespan_s(self) -> float:
        """End of the last action."""
        return max(self.rank_ends_s)

    @property
    def rank_ends_s(self) -> tuple[float, ...]:
        return tuple(row[-1] for row in self.ends_s)

    @property
    def busy_s(self) -> tuple[float, ...]:
        """Seconds that each rank computes."""
        return tuple(
            sum(end - start for start, end in zip(*rows, strict=True))
            for rows in zip(self.starts_s, self.ends_s, strict=True)
        )

    @property
    def bubbles_s(self) -> tuple[float, ...]:
        """Seconds that each rank idles between its first action and its last."""
        spans = [ends[-1] - starts[0] for starts, ends in zip(self.starts_s, self.ends_s, strict=True)]
        return tuple(span - busy for span, busy in zip(spans, self.busy_s, strict=True))


def run_schedule(
    schedule: Schedule, times: Sequence[StageTimes], memory: Sequence[StageBytes] = ()
) -> ScheduleRun:
    """Runs a schedule on stages that take ``times`` and hold ``memory`` (nothing, if it is not given).

    Linear in the number of actions. ``ProgramError`` if the schedule cannot run to its end or has another number of stages.
    """
    if len(times) != schedule.num_stages or len(memory) not in (0, schedule.num_stages):
        raise ProgramError(
            f"schedule {schedule.name} has {schedule.num_stages} stages, "
            f"and there are times of {len(times)} and bytes of {len(memory)}",
            hint="one StageTimes, and one StageBytes or none, for each stage",
        )
    rows = list(_steps(schedule, times))
    ran = walk(rows, 3 * schedule.num_stages * schedule.num_microbatches)
    if any(len(ends) < len(row) for ends, row in zip(ran.ends_s, rows, strict=True)):
        check_schedule(schedule)
    return ScheduleRun(
        starts_s=tuple(map(tuple, ran.starts_s)),
        ends_s=tuple(map(tuple, ran.ends_s)),
        peak_bytes=_peaks(schedule, memory) if memory else (0,) * schedule.num_ranks,
    )


def _steps(schedule: Schedule, times: Sequence[StageTimes]) -> Iterator[list[Step]]:
    """The rows as ``walk`` wants them. What an action needs is ``events.needs``, here in numbers, for speed."""
    m, num_stages = schedule.num_microbatches, schedule.num_stages
    ranks = schedule.stage_ranks
    apart = [stage > 0 and ranks[stage] != ranks[stage - 1] for stage in range(num_stages)]
    lags = [time.receive_s if far else 0.0 for time, far in zip(times, apart, strict=True)]
    last = num_stages - 1
    kinds: dict[tuple[int, ActionKind], Step] = {}
    for stage, time in enumerate(times):
        forward, backward, weight = (part * num_stages * m + stage * m for part in range(3))
        needed = (forward, 0.0) if stage == last else (backward + m, lags[stage + 1])
        kinds[stage, "F"] = (forward, forward - m if stage else -m, lags[stage], time.forward_s)
        kinds[stage, "I"] = (backward, *needed, time.input_s)
        kinds[stage, "B"] = (backward, *needed, time.whole_backward_s)
        kinds[stage, "W"] = (weight, backward, 0.0, time.weight_s)
    for row in schedule.actions:
        steps = []
        for action in row:
            slot, before, lag_s, took_s = kinds[action.stage, action.kind]
            number = action.microbatch
            steps.append((slot + number, before + number if before >= 0 else -1, lag_s, took_s))
        yield steps


def _peaks(schedule: Schedule, memory: Sequence[StageBytes]) -> tuple[int, ...]:
    """Most bytes of each rank; where there is no backward, a forward holds its own only while it runs."""
    is_training = any(action.kind != "F" for row in schedule.actions for action in row)
    changes: dict[tuple[int, ActionKind], tuple[int, int]] = {}
    for stage, part in enumerate(memory):
        changes[stage, "F"] = (part.held_bytes, 0 if is_training else -part.held_bytes)
        changes[stage, "B"] = (0, -part.held_bytes)
        changes[stage, "I"] = (0, -part.freed_by_input_bytes)
        changes[stage, "W"] = (0, part.freed_by_input_bytes - part.held_bytes)
    return tuple(_peak_bytes([changes[a.stage, a.kind] for a in row]) for row in schedule.actions)


def _peak_bytes(changes: Sequence[tuple[int, int]]) -> int:
    """Most of the running sum of changes, before and after each action."""
    held = peak = 0
    for before, after in changes:
        peak = max(peak, held + before, held + before + after)
        held += before + after
    return peak
