"""``OnClasses``: what ``best_cut`` asks, where it is given which units lie on each class of devices."""

from __future__ import annotations

from collections.abc import Sequence

from shardstage.planner.stages import Fitted, StageCosts

__all__ = ["OnClasses"]


class OnClasses:
    """``StageCosts`` of one pipeline: a stage fits on the units of its own class alone, which begin at ``firsts`` of each class."""

    has_unlike_stages = True

    def __init__(self, costs: StageCosts, classes: Sequence[int], firsts: Sequence[int]) -> None:
        self._costs = costs
        self._classes = classes
        self._ends = (*firsts, costs.num_units)

    @property
    def num_units(self) -> int:
        return self._costs.num_units

    def plain_s(self, stage: int, start: int, stop: int) -> float:
        return self._costs.plain_s(stage, start, stop)

    def fitted(self, stage: int, start: int, stop: int) -> Fitted | None:
        number = self._classes[stage]
        if start < self._ends[number] or stop > self._ends[number + 1]:
            return None
        return self._costs.fitted(stage, start, stop)
