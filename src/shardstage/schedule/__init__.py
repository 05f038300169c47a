"""In which order a pipeline's stages run their microbatches.

Owns the schedules as pure functions ``(num_stages, num_microbatches) -> Schedule`` and the field's text notation of actions. In go two
numbers, out comes a list of actions per stage. It refuses to know what a stage computes or what it costs.
"""

from shardstage.schedule.action import Action, Schedule
from shardstage.schedule.gpipe import gpipe
from shardstage.schedule.one_f_one_b import one_f_one_b

SCHEDULES = {"gpipe": gpipe, "1f1b": one_f_one_b}
"""Schedule functions by the name that a plan uses."""

__all__ = ["SCHEDULES", "Action", "Schedule", "gpipe", "one_f_one_b"]
