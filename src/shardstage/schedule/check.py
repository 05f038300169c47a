"""``check_schedule``: what every schedule must hold, whoever wrote it."""

from __future__ import annotations

from collections import Counter

from shardstage.errors import ProgramError
from shardstage.schedule.action import Schedule
from shardstage.schedule.draw import draw, unit_steps
from shardstage.schedule.events import needs, walk

__all__ = ["check_schedule"]

_MOST_NAMED = 6
"""Actions that a message names at most."""


def check_schedule(schedule: Schedule) -> None:
    """Raises ``ProgramError`` unless every stage runs every microbatch once each way, on its rank, in an order that can run to its end.

    Each way: F once, and B once or I and W once each; or F alone throughout, for inference.
    """
    _check_places(schedule)
    _check_counts(schedule)
    _check_order(schedule)


def _check_places(schedule: Schedule) -> None:
    sizes = (schedule.num_ranks, schedule.num_stages, schedule.num_microbatches)
    if min(sizes) < 1:
        raise ProgramError(
            "a schedule of {} ranks, {} stages and {} microbatches runs nothing".format(*sizes),
            hint="0F0 0B0",
        )
    for rank, row in enumerate(schedule.actions):
        for action in row:
            if not 0 <= action.stage < schedule.num_stages:
                raise ProgramError(
                    f"rank {rank} acts as {action}, and there are {schedule.num_stages} stages",
                    hint=f"stages are 0 to {schedule.num_stages - 1}",
                )
            if not 0 <= action.microbatch < schedule.num_microbatches:
                raise ProgramError(
                    f"rank {rank} acts as {action}, and there are {schedule.num_microbatches} microbatches",
                    hint=f"microbatches are 0 to {schedule.num_microbatches - 1}",
                )
            if schedule.stage_ranks[action.stage] != rank:
                holder = schedule.stage_ranks[action.stage]
                raise ProgramError(
                    f"rank {rank} acts as {action}, and stage {action.stage} is on rank {holder}",
                    hint=f"move {action} to the row of rank {holder}",
                )


def _check_counts(schedule: Schedule) -> None:
    found = Counter((a.stage, a.kind, a.microbatch) for row in schedule.actions for a in row)
    twice = [f"{s}{kind}{m}" for (s, kind, m), times in found.items() if times > 1]
    if twice:
        raise ProgramError(
            f"{_named(twice)}: more than once in schedule {schedule.name}", hint="each action once"
        )
    is_training = any(kind != "F" for _, kind, _ in found)
    missing, doubled = [], []
    for stage in range(schedule.num_stages):
        for m in range(schedule.num_microbatches):
            f, b, i, w = ((stage, kind, m) in found for kind in "FBIW")
            missing += [] if f else [f"{stage}F{m}"]
            if b and (i or w):
                doubled.append(f"{stage}B{m} and {stage}{'I' if i else 'W'}{m}")
            elif is_training and not b and not (i and w):
                missing.append(f"{stage}{'W' if i else 'I' if w else 'B'}{m}")
    if doubled:
        raise ProgramError(
            f"{_named(doubled)}: the backward more than once in schedule {schedule.name}",
            hint="B is the whole backward; I and W are its halves",
        )
    if missing:
        raise ProgramError(
            f"{_named(missing)}: missing in schedule {schedule.name}, where every stage runs each of the "
            f"{schedule.num_microbatches} microbatches forward and backward",
            hint=missing[0],
        )


def _check_order(schedule: Schedule) -> None:
    ran = walk(unit_steps(schedule), 3 * schedule.num_stages * schedule.num_microbatches)
    waits = []
    for rank, row in enumerate(schedule.actions):
        at = len(ran.ends_s[rank])
        if at < len(row):
            waits.append(
                f"rank {rank} waits at {row[at]} (action {at + 1} of {len(row)}) for {_awaited(schedule, rank, at)}"
            )
    if waits:
        more = [f"and {len(waits) - _MOST_NAMED} more ranks"] if len(waits) > _MOST_NAMED else []
        raise ProgramError(
            f"schedule {schedule.name} cannot run to its end:\n{draw(schedule)}\n"
            + "\n".join(waits[:_MOST_NAMED] + more),
            hint="on each rank, put an action behind what it waits for",
        )


def _awaited(schedule: Schedule, rank: int, at: int) -> str:
    """What the action waits for, by the name that it has in the schedule, and where that stands."""
    needed = needs(schedule, schedule.actions[rank][at])
    assert needed is not None, "an action that needs nothing does not wait"
    holder = schedule.stage_ranks[needed.stage]
    row = schedule.actions[holder]
    if needed not in row:
        needed = type(needed)(needed.stage, "B", needed.microbatch)
    return f"{needed}, which is action {row.index(needed) + 1} of rank {holder}"


def _named(actions: list[str]) -> str:
    more = f" and {len(actions) - _MOST_NAMED} more" if len(actions) > _MOST_NAMED else ""
    return ", ".join(actions[:_MOST_NAMED]) + more
