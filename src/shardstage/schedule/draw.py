"""``draw``: a schedule as a grid of text, a line a rank, a column a unit of time."""

from __future__ import annotations

from shardstage.schedule.action import Action, ActionKind, Schedule
from shardstage.schedule.events import Step, needs, slot_of, walk

__all__ = ["draw", "unit_steps"]

_UNITS: dict[ActionKind, int] = {"F": 1, "B": 2, "I": 1, "W": 1}
"""Columns that an action fills: a matrix product has one forward and two, equally large, backward."""


def draw(schedule: Schedule, *, num_columns: int = 80) -> str:
    """The schedule as it runs when F, I and W take one unit each and transfers none; lines longer than ``num_columns`` end in "…".

    rank 0 | F0 F1 .. .. B0 == .. B1 ==     B fills two units, .. is idle; with several stages a rank, actions name theirs: 2F0
    rank 1 | .. F0 B0 == F1 B1 ==

    A schedule that cannot run to its end is drawn as far as it goes; then ?? and the action that waits.
    """
    rows = unit_steps(schedule)
    ran = walk(rows, 3 * schedule.num_stages * schedule.num_microbatches)
    one_stage_each = schedule.stage_ranks == tuple(range(schedule.num_ranks))
    names = [[str(a)[len(str(a.stage)) * one_stage_each :] for a in row] for row in schedule.actions]
    width = max((len(name) for row in names for name in row), default=2)
    margin = len(str(schedule.num_ranks - 1))
    lines = []
    for rank, row in enumerate(schedule.actions):
        cells: list[str] = []
        for action, name, start in zip(row, names[rank], ran.starts_s[rank], strict=False):
            cells += ["." * width] * (round(start) - len(cells))
            cells += [name, *["=" * width] * (_UNITS[action.kind] - 1)]
        num_ran = len(ran.ends_s[rank])
        cells += ["?" * width, names[rank][num_ran]] if num_ran < len(row) else []
        line = f"rank {rank:{margin}} | " + " ".join(cell.ljust(width) for cell in cells).rstrip()
        lines.append(line if len(line) <= num_columns else line[: num_columns - 1] + "…")
    return "\n".join(lines)


def unit_steps(schedule: Schedule) -> list[list[Step]]:
    """Steps that take as many seconds as the grid has columns for them."""
    return [[_step(schedule, action) for action in row] for row in schedule.actions]


def _step(schedule: Schedule, action: Action) -> Step:
    needed = needs(schedule, action)
    before = -1 if needed is None else slot_of(schedule, needed)
    return slot_of(schedule, action), before, 0.0, float(_UNITS[action.kind])
