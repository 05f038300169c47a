"""``MixedPriced``: a choice for several classes of devices with its plan and price; ``TooLong``: that it cannot be the best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from shardstage.cost import Prediction, StepSetup
from shardstage.plan import Plan
from shardstage.planner.mixed.space import MixedChoice

__all__ = ["MixedPriced", "TooLong"]


@dataclass(frozen=True, kw_only=True, eq=False)
class MixedPriced:
    """A choice with its plan and price; ``peaks`` are the bytes of the fullest rank of each class."""

    choice: MixedChoice
    setup: StepSetup
    plan: Plan
    prediction: Prediction
    peaks: tuple[int, ...]

    @property
    def seconds(self) -> float:
        return self.prediction.step_time_s

    def fill_ratio(self, limits: Sequence[int]) -> float:
        """The share that the fullest rank holds of what one of its class may."""
        return max(peak / limit for peak, limit in zip(self.peaks, limits, strict=True))


class TooLong(Exception):
    """A choice whose price is not below the best one's."""

    def __init__(self, seconds: float = math.inf) -> None:
        super().__init__(seconds)
        self.seconds = seconds
