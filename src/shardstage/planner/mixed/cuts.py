"""``LanesAsStages``: what ``best_cut`` asks, where stages lie on classes of devices and several pipelines have the same cut.

A stage takes what it takes the slowest of the pipelines, and recomputes what fits into all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from shardstage.cost import Links, StepSetup
from shardstage.cost.compute import moved_s
from shardstage.graph.recompute import StageRecompute
from shardstage.planner.chain import Chain, ChainCosts, ShardingWaits
from shardstage.planner.mixed.space import Lane
from shardstage.planner.recut import Run, RunCosts, StepBound
from shardstage.planner.stages import Fitted

__all__ = ["LaneAsStages", "LanesAsStages"]


class LaneAsStages:
    """``StageCosts`` of one lane: each stage is a run of the chain of its own class. ``chains`` and ``limits`` are by class."""

    def __init__(
        self,
        lane: Lane,
        chains: Sequence[Chain | None],
        setup: StepSetup,
        links: Links,
        limits: Sequence[int],
        asked: StageRecompute | None = None,
    ) -> None:
        self._lane = lane
        self._args = (chains, setup, links, limits)
        element_s = (
            moved_s(setup.accumulation_bytes, links.cluster.device) if setup.num_microbatches > 1 else 0.0
        )
        self._of: dict[int, ChainCosts] = {}
        for number in {*lane.classes}:
            chain = chains[number]
            assert chain is not None
            self._of[number] = ChainCosts(
                chain,
                replace(setup, microbatch=lane.size),
                limits[number],
                element_s / (setup.num_shards if setup.sharding_level >= 2 else 1),
                None if setup.sharding_level < 2 else ShardingWaits(chain, setup, links),
                asked,
            )
        self._asked: dict[StageRecompute, LaneAsStages] = {}
        self._runs: dict[int, RunCosts] = {}

    @property
    def num_units(self) -> int:
        return self._of[self._lane.classes[0]].num_units

    @property
    def has_unlike_stages(self) -> bool:
        return len(self._of) > 1

    def plain_s(self, stage: int, start: int, stop: int) -> float:
        return self._of[self._lane.classes[stage]].plain_s(stage, start, stop)

    def fitted(self, stage: int, start: int, stop: int) -> Fitted | None:
        return self._of[self._lane.classes[stage]].fitted(stage, start, stop)

    def run(self, stage: int, start: int, stop: int) -> Run:
        """What ``quicker_cut`` asks."""
        number, (chains, setup, links, _) = self._lane.classes[stage], self._args
        if number not in self._runs:
            chain, sized = chains[number], replace(setup, microbatch=self._lane.size)
            assert chain is not None
            self._runs[number] = RunCosts(chain, sized, links, self._of[number])
        return self._runs[number](stage, start, stop)

    def bound(self) -> StepBound:
        """What a step takes at least, however the lane is cut."""
        chains, setup, links, _ = self._args
        own = [chain for chain in chains if chain is not None]
        added_s = moved_s(own[0].summed[-1] * setup.accumulation_bytes, links.cluster.device)
        weights = ([unit.weight_s for unit in chain.profile.units] for chain in own)
        most_weight_s = added_s + sum(map(max, zip(*weights, strict=True)))
        return StepBound.of(own[0], setup, links, bubble_s=0.0, weight_s=most_weight_s)

    def recomputing(self, mode: StageRecompute) -> LaneAsStages:
        """The same where every stage recomputes so."""
        if mode not in self._asked:
            self._asked[mode] = LaneAsStages(self._lane, *self._args, asked=mode)
        return self._asked[mode]


class LanesAsStages:
    """``StageCosts`` of several lanes with one cut."""

    def __init__(self, lanes: Sequence[LaneAsStages]) -> None:
        self._lanes = lanes
        self.num_units = lanes[0].num_units
        self.has_unlike_stages = any(lane.has_unlike_stages for lane in lanes)

    def plain_s(self, stage: int, start: int, stop: int) -> float:
        return max(lane.plain_s(stage, start, stop) for lane in self._lanes)

    def fitted(self, stage: int, start: int, stop: int) -> Fitted | None:
        found = [lane.fitted(stage, start, stop) for lane in self._lanes]
        each = [fitted for fitted in found if fitted is not None]
        if len(each) < len(found):
            return None
        fitting = (self._all(mode, stage, start, stop) for mode in dict.fromkeys(f.recompute for f in each))
        return min((fitted for fitted in fitting if fitted), key=lambda fitted: fitted.seconds, default=None)

    def _all(self, mode: StageRecompute, stage: int, start: int, stop: int) -> Fitted | None:
        """Where all lanes recompute so; None where that does not fit one of them."""
        found = [lane.recomputing(mode).fitted(stage, start, stop) for lane in self._lanes]
        if any(fitted is None for fitted in found):
            return None
        return Fitted(max(fitted.seconds for fitted in found if fitted), mode)
