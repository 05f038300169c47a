"""``quicker_cut``: of all cuts into pipeline stages of one rank each, one whose whole step is quicker than what is known.

    step = pipeline + transfers between stages + longest update + sums of gradients that nothing hides + first gathers   (``cost.step``)

``stages.best_cut`` minimises the pipeline alone, which is nearly all of a step of many microbatches. Over slow links, or with few of
them, a first stage of fewer parameters may spare more than it costs. Stage by stage, for each end that it may have, the beginnings of
cuts are kept that no other one of the same end is as good as in everything that the rest of the step asks of it, unless a lower bound
of what they end in says that they cannot be quicker. Exact, up to the last bits of sums, for ranks that have a device each, without a
calibration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from shardstage.cost.links import Links
from shardstage.cost.pipeline import SPLITTING
from shardstage.cost.setup import StepSetup
from shardstage.cost.stages import StageCost, least_update_s, run_cost
from shardstage.graph.recompute import StageRecompute
from shardstage.planner.chain import Chain, ChainCosts
from shardstage.planner.stages import Cut, StageCosts, earliest_starts

__all__ = [
    "Run",
    "RunCosts",
    "StepBound",
    "least_beside_s",
    "least_pipeline_s",
    "quicker_cut",
]

ROUNDING: Final = 1e-12
"""Relative: sums of the same seconds in another order differ by less."""

WORTH_TAKING: Final = 1e-9
"""Relative: another cut is taken where it is quicker by so much."""


class Run(NamedTuple):
    """A run of units as a stage, which recomputes the least that it must."""

    cost: StageCost
    recompute: StageRecompute


Runs = Callable[[int, int, int], Run]
"""Any run of units (stage, start, stop) that fits as a stage."""


class RunCosts:
    """``Runs`` of a chain under one setup; equal ones are priced once."""

    def __init__(self, chain: Chain, setup: StepSetup, links: Links, costs: ChainCosts) -> None:
        self._chain, self._setup, self._links, self._costs = chain, setup, links, costs
        self._known: dict[tuple[StageRecompute, bool, int, int], Run] = {}

    def __call__(self, stage: int, start: int, stop: int) -> Run:
        fitted = self._costs.fitted(stage, start, stop)
        assert fitted is not None, "what is asked for fits"
        start, stop = self._chain.first_alike(start, stop)
        key = (fitted.recompute, stage > 0, start, stop)
        if key not in self._known:
            units = range(start, stop)
            cost = run_cost(self._chain.profile, self._setup, self._links, stage, units, fitted.recompute)
            self._known[key] = Run(cost, fitted.recompute)
        return self._known[key]


@dataclass(frozen=True, kw_only=True)
class StepBound:
    """What a step takes at least, of the beginning of a cut.

    ``beside_s`` are least seconds of what is not the pipeline's: ``update_s`` of them the optimizer's, ``travel_s`` those of one
    transfer there and back, and ``bubble_s`` of a schedule that splits backwards, of which so much, ``weight_s``, can be put off at most.
    """

    num_stages: int
    num_microbatches: int
    is_split: bool
    beside_s: float
    update_s: float
    travel_s: float
    bubble_s: float
    weight_s: float
    hides_sums: bool
    hides_gathers: bool

    @classmethod
    def of(
        cls, chain: Chain, setup: StepSetup, links: Links, *, bubble_s: float, weight_s: float
    ) -> StepBound:
        """However the units are cut."""
        return cls(
            num_stages=setup.mesh.pp,
            num_microbatches=setup.num_microbatches,
            is_split=setup.schedule in SPLITTING,
            beside_s=least_beside_s(chain, setup, links) + bubble_s,
            update_s=_least_update_s(chain, setup, links),
            travel_s=_least_travel_s(chain, links),
            bubble_s=bubble_s,
            weight_s=weight_s,
            hides_sums=setup.sharding_level < 2 or bool(chain.profile.shared_elements),
            hides_gathers=setup.sharding_level >= 2,
        )

    def seconds(self, of: _Begun, slowest_s: float, rest_s: float) -> float:
        """Where the slowest stage takes so long at least, and all that follow do together."""
        m, p = self.num_microbatches, self.num_stages
        both_s = of.forward_s + of.backward_s + rest_s
        if self.is_split:
            weight_s = of.weight_s if of.num_stages == p else self.weight_s
            bubble_s = (p - 1) / p * (both_s - 2 * weight_s)  # F + I - W of mean stages, or more
            pipeline_s = m * slowest_s + max(0.0, bubble_s - self.bubble_s)
        else:
            pipeline_s = (m - 1) * slowest_s + both_s
        more_s = max(0.0, of.update_s - self.update_s)
        more_s += of.travel_s - max(0, of.num_stages - 1) * self.travel_s
        return pipeline_s + self.beside_s + more_s + of.summing_s + of.gathering_s

    def most_stage_s(self, below_s: float, all_s: float) -> float:
        """What a stage may take where the step is to take less, and all stages take so long together at least."""
        m, room_s = self.num_microbatches, below_s - self.beside_s
        if self.is_split:
            return room_s / m
        return (room_s - all_s) / (m - 1) if m > 1 else room_s


class _Begun(NamedTuple):
    """The beginning of a cut: the last of its stages ends at unit ``stop``."""

    before: _Begun | None = None
    stop: int = 0
    num_stages: int = 0
    recompute: StageRecompute = "none"
    slowest_s: float = 0.0
    forward_s: float = 0.0
    backward_s: float = 0.0
    weight_s: float = 0.0
    travel_s: float = 0.0
    update_s: float = 0.0
    summing_s: float = 0.0
    gathering_s: float = 0.0

    def then(self, stop: int, run: Run) -> _Begun:
        """With one stage more."""
        cost, time = run.cost, run.cost.time
        return _Begun(
            before=self,
            stop=stop,
            num_stages=self.num_stages + 1,
            recompute=run.recompute,
            slowest_s=max(self.slowest_s, time.both_s),
            forward_s=self.forward_s + time.forward_s,
            backward_s=self.backward_s + time.backward_s,
            weight_s=self.weight_s + time.weight_s,
            travel_s=self.travel_s + 2 * time.receive_s,
            update_s=max(self.update_s, cost.update_s),
            summing_s=max(self.summing_s, cost.reduction_s - self.backward_s),
            gathering_s=max(self.gathering_s, cost.unshard_s - self.forward_s),
        )

    def costs(self, bound: StepBound) -> tuple[float, ...]:
        """What the rest of a step asks of it: the less of each, the better."""
        f, b = self.forward_s, self.backward_s
        return (
            *(self.slowest_s, self.travel_s, self.update_s, self.summing_s, self.gathering_s),
            *((f, b, -self.weight_s) if bound.is_split else (f + b,)),
            *((-b,) if bound.hides_sums else ()),
            *((-f,) if bound.hides_gathers else ()),
        )

    def cut(self) -> tuple[tuple[int, ...], tuple[StageRecompute, ...]]:
        """First units of the stages, and what each recomputes."""
        stages = [self, *self._before()]
        stages.reverse()
        return tuple(stage.stop for stage in stages[:-1]), tuple(stage.recompute for stage in stages[1:])

    def _before(self) -> Iterator[_Begun]:
        before = self.before
        while before is not None:
            yield before
            before = before.before


def least_beside_s(chain: Chain, setup: StepSetup, links: Links) -> float:
    """What a step takes at least beside its pipeline, wherever that is cut: transfers, the optimizer, the norm's sum."""
    travel_s = (setup.mesh.pp - 1) * _least_travel_s(chain, links)
    return links.norm_s() + travel_s + _least_update_s(chain, setup, links)


def _least_travel_s(chain: Chain, links: Links) -> float:
    """Of the first microbatch from one stage to the next, and of the last one's gradient back."""
    return 2 * links.least_travel_s(min(chain.received[1:], default=0))


def _least_update_s(chain: Chain, setup: StepSetup, links: Links) -> float:
    """``least_update_s`` of the units on the pipeline's ranks, wherever they are cut."""
    p, n = setup.mesh.pp, chain.num_units
    shards = setup.num_shards if setup.sharding_level else 1
    part = (chain.own[n] - chain.experts[n]) / shards + chain.experts[n] / setup.expert_shards
    return least_update_s(chain.own[n] / p, chain.experts[n] / p, part / p, setup, links)


def least_pipeline_s(cut: Cut, setup: StepSetup) -> float:
    """What the pipeline takes in no cut less than in its best one, ``best_cut``'s, but for a bubble of a schedule that splits backwards."""
    m = setup.num_microbatches
    return m * cut.slowest_s if setup.schedule in SPLITTING else cut.pipeline_s(m)


def quicker_cut(
    costs: StageCosts,
    runs: Runs,
    bound: StepBound,
    *,
    pipeline_s: float,
    below_s: float,
    seconds_of: Callable[[tuple[int, ...], tuple[StageRecompute, ...]], float],
) -> tuple[tuple[int, ...], tuple[StageRecompute, ...]] | None:
    """First units of stages, and what each recomputes, of the quickest step, ``seconds_of`` them; None where none is below ``below_s``.

    The pipeline takes ``pipeline_s`` in no cut less. Of ranks that have a device each, and no calibration.
    """
    best: tuple[tuple[int, ...], tuple[StageRecompute, ...]] | None = None
    best_s = below_s * (1 - WORTH_TAKING)
    if pipeline_s + bound.beside_s >= best_s:
        return None
    kept = _ends(costs, runs, bound, best_s)
    for least_s, begun in sorted(kept, key=lambda each: each[0]):
        if least_s >= best_s:
            break
        cut = begun.cut()
        seconds = seconds_of(*cut)
        if seconds < best_s:
            best, best_s = cut, seconds
    return best


def _ends(costs: StageCosts, runs: Runs, bound: StepBound, below_s: float) -> list[tuple[float, _Begun]]:
    """Whole cuts whose bounds are below, with these."""
    n, start = costs.num_units, _Begun()
    unlike = range(bound.num_stages) if costs.has_unlike_stages else (0,)
    all_s = min(costs.plain_s(stage, 0, n) for stage in unlike)
    stages = _stages(costs, bound.num_stages, bound.most_stage_s(below_s, all_s))
    rest = _rest(stages, n)
    reached: dict[int, list[_Kept]] = {0: [_Kept((), 0.0, start)]}
    for stage, (ends, after) in enumerate(zip(stages, rest, strict=True)):
        following: dict[int, list[_Kept]] = {}
        for first, begun_there in reached.items():
            for stop, own_s in ends[first].items():
                if stop not in after:
                    continue
                rest_slowest_s, rest_s = after[stop]
                least_slowest_s = max(own_s, rest_slowest_s)
                for _, _, begun in begun_there:
                    if bound.seconds(begun, max(begun.slowest_s, least_slowest_s), own_s + rest_s) >= below_s:
                        continue
                    then = begun.then(stop, runs(stage, first, stop))
                    least_s = bound.seconds(then, max(then.slowest_s, least_slowest_s), rest_s)
                    if least_s < below_s:
                        _keep(following.setdefault(stop, []), _Kept(then.costs(bound), least_s, then))
        reached = following
    return [(least_s, begun) for _, least_s, begun in reached.get(n, [])]


def _stages(costs: StageCosts, num_stages: int, most_s: float) -> list[dict[int, dict[int, float]]]:
    """For each stage the seconds of runs, by first unit and end, that take so long at most and leave the others units enough and not too
    many."""
    n, earliest = costs.num_units, earliest_starts(costs, num_stages, most_s)
    found, reached = [], {0}
    for stage in range(num_stages):
        last = n - (num_stages - stage - 1)
        of_stage: dict[int, dict[int, float]] = {}
        for start in sorted(reached):
            of_start = of_stage[start] = {}
            for stop in range(max(start + 1, earliest[stage + 1]), last + 1):
                fitted = costs.fitted(stage, start, stop)
                if fitted is None or fitted.seconds > most_s:
                    break
                of_start[stop] = fitted.seconds
        found.append(of_stage)
        reached = {stop for of_start in of_stage.values() for stop in of_start}
    return found


def _rest(stages: list[dict[int, dict[int, float]]], num_units: int) -> list[dict[int, tuple[float, float]]]:
    """For each stage, by where it ends, what the slowest of those that follow takes at least, and what all of them do together."""
    after = {num_units: (0.0, 0.0)}
    found = [after]
    for stage in reversed(stages[1:]):
        before: dict[int, tuple[float, float]] = {}
        for start, of_start in stage.items():
            ways = [(own_s, *after[stop]) for stop, own_s in of_start.items() if stop in after]
            if ways:
                slowest_s = min(max(own_s, slowest) for own_s, slowest, _ in ways)
                before[start] = slowest_s, min(own_s + all_s for own_s, _, all_s in ways)
        found.append(before)
        after = before
    return found[::-1]


class _Kept(NamedTuple):
    """A beginning, what the rest asks of it, and a bound of what it ends in."""

    costs: tuple[float, ...]
    least_s: float
    begun: _Begun


def _keep(kept: list[_Kept], begun: _Kept) -> None:
    """Adds a beginning unless one is as good in everything, and drops those that it is as good as."""
    if any(_is_as_good(other.costs, begun.costs) for other in kept):
        return
    kept[:] = [other for other in kept if not _is_as_good(begun.costs, other.costs)]
    kept.append(begun)


def _is_as_good(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return all(a <= b + ROUNDING * math.fabs(b) for a, b in zip(one, other, strict=True))
