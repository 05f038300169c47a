"""``SCHEDULES``: the schedules by the name that a plan uses, and ``make_schedule``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from shardstage.errors import ProgramError
from shardstage.schedule.action import Action, Schedule
from shardstage.schedule.dualpipe_v import dualpipe_v
from shardstage.schedule.forward_only import forward_only
from shardstage.schedule.gpipe import gpipe
from shardstage.schedule.interleaved_1f1b import interleaved_1f1b, interleaved_1f1b_row
from shardstage.schedule.looped_bfs import looped_bfs
from shardstage.schedule.one_f_one_b import one_f_one_b
from shardstage.schedule.places import Places
from shardstage.schedule.zb_h1 import zb_h1
from shardstage.schedule.zb_v import zb_v

__all__ = ["SCHEDULES", "ScheduleKind", "make_schedule"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleKind:
    """A family of schedules: ``build(num_ranks, num_microbatches, stages_per_rank)`` makes its members.

    ``places`` says how many stages a rank runs and which; ``splits_backward`` whether some backwards are cut into I and W;
    ``row(rank, num_ranks, num_microbatches, stages_per_rank)`` makes one rank's row alone.
    """

    name: str
    build: Callable[[int, int, int], Schedule]
    places: Places
    splits_backward: bool = False
    row: Callable[[int, int, int, int], tuple[Action, ...]] | None = None

    def takes(self, stages_per_rank: int) -> bool:
        """Whether a rank may run so many stages."""
        return {"one": stages_per_rank == 1, "loop": stages_per_rank >= 1, "v": stages_per_rank == 2}[
            self.places
        ]


_KINDS: Final = (
    ScheduleKind(name="gpipe", build=lambda p, m, _: gpipe(p, m), places="one"),
    ScheduleKind(name="1f1b", build=lambda p, m, _: one_f_one_b(p, m), places="one"),
    ScheduleKind(name="interleaved-1f1b", build=interleaved_1f1b, places="loop", row=interleaved_1f1b_row),
    ScheduleKind(name="looped-bfs", build=looped_bfs, places="loop"),
    ScheduleKind(name="zb-h1", build=lambda p, m, _: zb_h1(p, m), places="one", splits_backward=True),
    ScheduleKind(
        name="zb-v",
        build=lambda p, m, _: zb_v(p, m),
        places="v",
        splits_backward=True,
    ),
    ScheduleKind(
        name="dualpipe-v",
        build=lambda p, m, _: dualpipe_v(p, m),
        places="v",
        splits_backward=True,
    ),
    ScheduleKind(name="forward-only", build=forward_only, places="loop"),
)

SCHEDULES: Final[Mapping[str, ScheduleKind]] = MappingProxyType({kind.name: kind for kind in _KINDS})
"""Kinds of schedules by the name that a plan uses."""


def make_schedule(name: str, *, num_stages: int, num_ranks: int, num_microbatches: int) -> Schedule:
    """The named schedule of so many stages on so many pipeline ranks; ``ProgramError`` for a name or sizes that cannot be."""
    kind = SCHEDULES.get(name)
    if kind is None:
        raise ProgramError(
            f"{name!r} is not a schedule; there are {', '.join(SCHEDULES)}", hint='schedule = "1f1b"'
        )
    if min(num_stages, num_ranks, num_microbatches) < 1:
        raise ProgramError(
            f"{name} needs at least one stage, one rank and one microbatch, "
            f"and there are {num_stages}, {num_ranks} and {num_microbatches}",
            hint=f"make_schedule({name!r}, num_stages=4, num_ranks=4, num_microbatches=8)",
        )
    stages_per_rank, left = divmod(num_stages, num_ranks)
    if left or not kind.takes(stages_per_rank):
        needed = {"one": "exactly one stage", "loop": "equally many stages", "v": "exactly two stages"}
        fitting = {"one": 1, "loop": max(1, stages_per_rank), "v": 2}[kind.places]
        raise ProgramError(
            f"{name} runs {needed[kind.places]} on each rank, and {num_stages} stages on {num_ranks} ranks are not that",
            hint=f"{fitting * num_ranks} stages, {fitting} on each of {num_ranks} ranks",
        )
    return kind.build(num_ranks, num_microbatches, stages_per_rank)
