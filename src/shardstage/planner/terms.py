"""``Terms``: what the bounds of all rows of some groups share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from shardstage.cluster import DeviceClass
from shardstage.cost.compute import moved_s
from shardstage.cost.links import overlap_slowdown
from shardstage.cost.profile import RECOMPUTES, Recompute
from shardstage.planner.even import EvenCuts
from shardstage.planner.figures import Figures
from shardstage.planner.lattice import Lattice
from shardstage.planner.trade import Trade

__all__ = ["BoundSettings", "Terms"]

Array = npt.NDArray[np.float64]

ALIKE_RATIO: Final = 0.9
"""Units that take so much of the time of those that take longest in all are as many of them: the first layer, say, a kind of its own."""


@dataclass(frozen=True, kw_only=True)
class BoundSettings:
    """What all choices share: bytes of an element computed with, in the optimizer and of gradients' sums, of a bucket."""

    device: DeviceClass
    compute_bytes: int
    master_bytes: int
    gradient_bytes: int
    bucket_bytes: int
    is_offloaded: bool = False
    least_factor: float = 1.0
    limit_bytes: int = 0
    modes: tuple[Recompute, ...] = RECOMPUTES

    @property
    def summing_s(self) -> float:
        """Seconds of adding an element's gradient to its sum."""
        return moved_s(self.compute_bytes + 2.0 * self.gradient_bytes, self.device)

    def step_s(self, pipeline_s: Any, work_s: Any, after_s: Any) -> Any:
        """Of a step; on shared cores all ranks' work, or the pipeline as quick as if each rank were alone."""
        if self.device.alone_ratio > 1:
            pipeline_s = np.maximum(pipeline_s / self.device.alone_ratio, work_s)
        return self.least_factor * (pipeline_s + after_s)


class _Least:
    """What so many units of a group add up to at least, whichever they are; ``values`` [kind, group] are those of one unit."""

    def __init__(self, values: Array, numbers: Array) -> None:
        order = np.argsort(values, axis=0, kind="stable")
        self._values = np.take_along_axis(values, order, axis=0)
        self._numbers = numbers[order]

    def of(self, number: Any, group: Any) -> Any:
        """[row, 1], as are so many units and the group."""
        found = np.zeros_like(number)
        for values, numbers in zip(self._values, self._numbers, strict=True):
            taken = np.minimum(number, numbers[group])
            found += taken * values[group]
            number = number - taken
        return found


class Terms:
    """Of some groups, [group] each: sums over all units, the heaviest unit, and what any unit has of the kind that takes longest in all, or
    of a kind that takes as long (``most``).

    ``number`` [group of the lattice] is where a group stands here.
    """

    def __init__(
        self, lattice: Lattice, figures: Figures, groups: Any, settings: BoundSettings, even: EvenCuts
    ) -> None:
        self.settings = settings
        self.figures = figures
        self.meshes = lattice.meshes
        self.even = even
        self.slowdown = overlap_slowdown(settings.device)
        self.levels = np.array([zero.level for zero in lattice.zeros])
        self.are_near = np.array([zero.num_ranks is not None for zero in lattice.zeros])
        self.number = np.zeros(len(lattice.groups), dtype=np.int64)
        self.number[groups] = np.arange(len(groups))
        of_groups = [lattice.groups[number] for number in groups.tolist()]
        self.microbatch = np.array([group.microbatch for group in of_groups], dtype=np.float64)
        self.ep = np.array([group.ep for group in of_groups], dtype=np.float64)
        f = figures
        whole = f.whole[:, None]
        self.forward = f.whole @ f.forward_s
        self.backward = f.whole @ f.backward_s
        self.weight = f.whole @ f.weight_s
        self.own = f.whole @ f.own
        self.replicated = f.whole @ f.replicated
        self.costs = lattice.costs
        self.deals_out_experts = np.array([g.ep > 1 or g.has_whole_experts for g in of_groups], dtype=bool)
        self.expert_stride = np.array([g.ep * (1 if g.has_whole_experts else g.tp) for g in of_groups])
        self.holders = np.array([g.tp if g.has_whole_experts else 1 for g in of_groups], dtype=np.float64)
        self.experts = f.whole @ f.experts
        self.summing_s = f.own * settings.summing_s
        self.slowest_unit = f.both_s.max(axis=0)
        self.slowest_summed_unit = (f.both_s + self.summing_s).max(axis=0)
        self.more_summed = f.uses - f.shared
        self.gathers = f.whole @ f.calls
        self.least_replicated = _Least(f.replicated, f.whole)
        self.least_calls = _Least(f.calls, f.whole)
        again, saved = (np.array([each[mode] for mode in settings.modes]) for each in (f.again_s, f.saved))
        self.trade = Trade(again, saved, whole)
        self.again_whole = {mode: f.whole @ f.again_s[mode] for mode in settings.modes}
        self.layer_trade = self._layer_trade()
        most = np.take_along_axis(f.both_s, np.argmax(whole * f.both_s, axis=0)[None], axis=0)
        is_alike = f.both_s >= ALIKE_RATIO * most

        def least(values: Any) -> Any:
            return np.where(is_alike, values, np.inf).min(axis=0)

        self.most_number = (whole * is_alike).sum(axis=0)
        self.most_both = least(f.both_s)
        self.most_own, self.most_experts = least(f.own), least(f.experts)
        self.most_modes = [
            tuple(least(each[mode]) for each in (f.again_s, f.saved, f.passing)) for mode in settings.modes
        ]
        self.most_passing = np.min([passing for _, _, passing in self.most_modes], axis=0)
        self.most_trade = Trade(
            np.array([[seconds] for seconds, _, _ in self.most_modes]),
            np.array([[num_bytes] for _, num_bytes, _ in self.most_modes]),
            np.ones((1, len(groups))),
        )

    def _layer_trade(self) -> Trade | None:
        """Of a layer that spares as much as any and costs as little as any; None where layers cannot be told from units, or nothing may
        be chosen."""
        f, kinds, modes = self.figures, self.even.layer_kinds, self.settings.modes
        if not kinds or len(modes) < len(RECOMPUTES):
            return None
        spared = np.array([(f.saved["none"] - f.saved[mode])[kinds].max(axis=0) for mode in modes])
        seconds = np.array([f.again_s[mode][kinds].min(axis=0) for mode in modes])
        self.layer_passing = np.min([f.passing[mode][kinds].min(axis=0) for mode in modes[1:]], axis=0)
        spared = np.maximum(0.0, spared)
        self.layer_seconds, self.layer_bytes = seconds[1:], spared[1:]
        return Trade(seconds[:, None], -spared[:, None], np.ones((1, 1)))
