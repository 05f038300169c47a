"""``Trade``: the least that units recompute where all of them together may keep so much, in many groups at once.

Where stages are cut freely, all of them together hold at most p times the limit, each unit by the recomputation that spares most bytes for
its seconds; by convexity no cut does better, nor do stages that recompute a part of their units.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Trade"]

Array = npt.NDArray[np.float64]


class Trade:
    """Saved bytes of a microbatch with the least seconds of recomputation for them, in each group: between corners it is linear.

    ``seconds`` and ``saved`` [mode, kind, group] are those of each way to run a unit, ``numbers`` [kind, 1 or group] how many there are.
    """

    def __init__(self, seconds: Array, saved: Array, numbers: Array) -> None:
        steps = [*_steps(seconds, saved)]
        by_rate = np.concatenate([rate for rate, _ in steps])
        spared = np.concatenate([num_bytes * numbers for _, num_bytes in steps])
        order = np.argsort(by_rate, axis=0, kind="stable")
        self._rates = np.take_along_axis(by_rate, order, axis=0)
        self._spared = np.take_along_axis(spared, order, axis=0)
        quickest = np.argmin(seconds, axis=0)[None]
        self.most_saved: Array = (np.take_along_axis(saved, quickest, axis=0)[0] * numbers).sum(axis=0)
        self.least_s: Array = (seconds.min(axis=0) * numbers).sum(axis=0)
        self.least_saved: Array = self.most_saved - self._spared.sum(axis=0)
        used = self._spared.any(axis=1)
        self._rates, self._spared = self._rates[used], self._spared[used]

    def again_s(self, saved: Any, group: Any) -> Any:
        """Seconds that all units recompute at least in these groups where they may keep so many bytes, [row, 1] both."""
        missing = self.most_saved[group] - saved
        seconds = self.least_s[group] + np.zeros_like(missing)
        for rate, spared in zip(self._rates, self._spared, strict=True):
            part = spared[group]
            seconds += rate[group] * np.clip(missing, 0.0, part)
            missing = missing - part
        return seconds


def _steps(seconds: Array, saved: Array) -> Sequence[tuple[Array, Array]]:
    """From the quickest way of each kind to the one of fewest bytes along the convex hull, [kind, group] each: seconds a byte that is
    spared, and bytes. Steps that a kind does not have spare none."""
    at = np.argmin(seconds, axis=0)[None]
    now_s, now_bytes = (np.take_along_axis(each, at, axis=0)[0] for each in (seconds, saved))
    steps = []
    for _ in range(len(seconds) - 1):
        is_less = saved < now_bytes
        with np.errstate(divide="ignore", invalid="ignore"):
            rates = np.where(is_less, (seconds - now_s) / (now_bytes - saved), np.inf)
        at = np.argmin(rates, axis=0)[None]
        has_step = is_less.any(axis=0)
        next_s, next_bytes = (np.take_along_axis(each, at, axis=0)[0] for each in (seconds, saved))
        rate = np.take_along_axis(rates, at, axis=0)[0]
        steps.append((np.where(has_step, rate, 0.0), np.where(has_step, now_bytes - next_bytes, 0.0)))
        now_s, now_bytes = np.where(has_step, next_s, now_s), np.where(has_step, next_bytes, now_bytes)
    return steps or [(np.zeros_like(now_s), np.zeros_like(now_s))]
