"""``Trade``: the least that the units of one group recompute where all stages together may keep so much.

Where stages are cut freely, all of them together hold at most p times the limit, each unit by the recomputation that spares most bytes for
its seconds; by convexity no cut does better.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from shardstage.cost.profile import Recompute, UnitCost

__all__ = ["Trade"]

Array = npt.NDArray[np.float64]


class Trade:
    """Saved bytes of a microbatch, ascending, with the least seconds of recomputation for them: between the corners it is linear."""

    def __init__(
        self, kinds: Sequence[UnitCost], numbers: Iterable[float], modes: Sequence[Recompute]
    ) -> None:
        saved = again_s = 0.0
        steps: list[tuple[float, float, float]] = []
        for unit, number in zip(kinds, numbers, strict=True):
            points = [(unit.kept[mode].recompute_s, unit.kept[mode].saved_bytes) for mode in modes]
            seconds, num_bytes = min(points)
            saved, again_s = saved + number * num_bytes, again_s + number * seconds
            while less := [point for point in points if point[1] < num_bytes]:
                rate, following = min(((s - seconds) / (num_bytes - b), (s, b)) for s, b in less)
                steps.append((rate, number * (num_bytes - following[1]), number * (following[0] - seconds)))
                seconds, num_bytes = following
        corners = [(saved, again_s)]
        for _, spared, added_s in sorted(steps):
            saved, again_s = saved - spared, again_s + added_s
            corners.append((saved, again_s))
        self._corners = np.array(corners[::-1], dtype=np.float64)

    @property
    def least_saved(self) -> float:
        """Bytes that all units keep where they recompute as much as they may."""
        return float(self._corners[0, 0])

    def again_s(self, saved: Array) -> Array:
        """Seconds that all units recompute at least where they may keep so many bytes."""
        found: Array = np.interp(saved, self._corners[:, 0], self._corners[:, 1])
        return found
