"""``Alike``: the least that stages recompute, as many layers in each of them, so that every rank's memory holds it.

For schedules that give each rank several stages, whose activations do not peak together: what a rank holds is asked of ``cost.memory``.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise

from shardstage.cost import MemoryModel, Profile, StepSetup
from shardstage.graph.recompute import StageRecompute, counted
from shardstage.planner.recompute import Layers

__all__ = ["Alike"]


class Alike:
    """Stages of one cut under a limit; ``setup`` holds their starts."""

    def __init__(self, profile: Profile, setup: StepSetup, limit_bytes: int) -> None:
        self._setup = setup
        self._profile = profile
        self._limit_bytes = limit_bytes
        last = setup.mesh.pp - 1
        self._ranks = [last, *range(last)]

    def setup(self, recompute: StageRecompute) -> StepSetup:
        """With stages that recompute so."""
        return replace(self._setup, recompute=recompute)

    def within(self, recompute: StageRecompute) -> MemoryModel | None:
        """What each rank holds; None as soon as one of them exceeds the limit, which is asked first the next time."""
        memory = MemoryModel(self._profile, self.setup(recompute))
        for rank in self._ranks:
            if memory.rank(rank).total_bytes > self._limit_bytes:
                self._ranks.remove(rank)
                self._ranks.insert(0, rank)
                return None
        return memory

    def least(self, layers: Layers) -> StageRecompute | None:
        """What fits with the least seconds of recomputation in all, by bisection: beyond a first layer more never takes more memory.

        Of each stage so many layers recompute in full, those up to an end selectively.
        """
        bounds = (*self._setup.starts, len(self._profile.units))
        runs = list(pairwise(bounds))
        most = max(len(layers.ends(*run)) for run in runs) - 1

        def fits(full: int, end: int) -> bool:
            return self.within(counted(full, end - full, most)) is not None

        def seconds(full: int, end: int) -> float:
            recompute = counted(full, end - full, most)
            return sum(layers.again_s(layers.runs(recompute, *run)) for run in runs)

        in_full = _first(1, most + 1, lambda full: fits(full, full))
        found = [(in_full, in_full)] if in_full <= most else []
        beside = 0 if fits(0, most) else _first(1, min(in_full, most + 1), lambda full: fits(full, most))
        for full in range(beside, min(in_full, most + 1)):
            if fits(full, most):
                found.append((full, _first(full + 1, most, partial(fits, full))))
        if not found:
            return None
        full, end = min(found, key=lambda each: seconds(*each))
        return counted(full, end - full, most)


def _first(low: int, high: int, is_true: Callable[[int], bool]) -> int:
    """The least number from ``low`` on from which it is true, ``high`` where it is not before."""
    return low + bisect_left(range(low, high), True, key=is_true)
