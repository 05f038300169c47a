"""In which order a pipeline's ranks act on stages and microbatches.

Owns the schedules as pure functions of sizes, the field's text notation of actions, what a schedule must hold, when its actions run on
stages of given times, and the search for the best one (``schedule.search``, which is loaded where it is asked for). In go numbers and text,
out come a row of actions per rank and seconds. It refuses to know what a stage computes, and where its seconds and bytes come from.
"""

from shardstage.schedule.action import Action, ActionKind, Schedule
from shardstage.schedule.check import check_schedule
from shardstage.schedule.draw import draw
from shardstage.schedule.dualpipe_v import dualpipe_v
from shardstage.schedule.forward_only import forward_only
from shardstage.schedule.gpipe import gpipe
from shardstage.schedule.held import (
    held_by_stage,
    held_in_rounds,
    held_together,
    stages_of_rank,
    steady_microbatches,
)
from shardstage.schedule.interleaved_1f1b import interleaved_1f1b
from shardstage.schedule.looped_bfs import looped_bfs
from shardstage.schedule.one_f_one_b import one_f_one_b
from shardstage.schedule.places import Places, place_stages
from shardstage.schedule.registry import SCHEDULES, ScheduleKind, make_schedule
from shardstage.schedule.text import parse_schedule
from shardstage.schedule.timing import ScheduleRun, StageBytes, StageTimes, run_schedule
from shardstage.schedule.zb_h1 import zb_h1
from shardstage.schedule.zb_v import zb_v

__all__ = [
    "SCHEDULES",
    "Action",
    "ActionKind",
    "Places",
    "Schedule",
    "ScheduleKind",
    "ScheduleRun",
    "StageBytes",
    "StageTimes",
    "check_schedule",
    "draw",
    "dualpipe_v",
    "forward_only",
    "gpipe",
    "held_by_stage",
    "held_in_rounds",
    "held_together",
    "interleaved_1f1b",
    "looped_bfs",
    "make_schedule",
    "one_f_one_b",
    "parse_schedule",
    "place_stages",
    "run_schedule",
    "stages_of_rank",
    "steady_microbatches",
    "zb_h1",
    "zb_v",
]
