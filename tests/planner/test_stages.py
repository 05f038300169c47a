"""The exact cut: as good as the best of all cuts with all ways to recompute, on thousands of small chains."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import pytest

from shardstage.graph.recompute import Recompute, StageRecompute, counted, layer_modes
from shardstage.planner.stages import Cut, Fitted, best_cut


@dataclass(frozen=True, kw_only=True)
class MadeUp:
    """Units, each a layer, with seconds, recomputed seconds and saved bytes of each mode; the more it recomputes, the less it saves.

    What a stage may recompute is tried one by one; or it is what is ``asked``.
    """

    seconds_of: tuple[float, ...]
    again_of: dict[Recompute, tuple[float, ...]]
    saved_of: dict[Recompute, tuple[float, ...]]
    state_of: tuple[float, ...]
    in_flight: tuple[int, ...]
    limit: float
    asked: StageRecompute | None = None
    known: dict[tuple[int, int, int], Fitted | None] = field(init=False, default_factory=dict)

    @property
    def has_unlike_stages(self) -> bool:
        return False

    @property
    def num_units(self) -> int:
        return len(self.seconds_of)

    def plain_s(self, stage: int, start: int, stop: int) -> float:
        return self.seconds(start, stop, self.asked or "none")

    def fitted(self, stage: int, start: int, stop: int) -> Fitted | None:
        if (stage, start, stop) not in self.known:
            found = [
                Fitted(self.seconds(start, stop, recompute), recompute)
                for recompute in self.offered(start, stop)
                if self.fits(stage, start, stop, recompute)
            ]
            least = min(found, key=lambda fitted: fitted.seconds, default=None)
            self.known[stage, start, stop] = least
        return self.known[stage, start, stop]

    def offered(self, start: int, stop: int) -> list[StageRecompute]:
        """Every number of layers in full, then selectively."""
        num = stop - start
        each = [counted(full, some, num) for full in range(num + 1) for some in range(num + 1 - full)]
        return each if self.asked is None else [self.asked]

    def seconds(self, start: int, stop: int, recompute: StageRecompute) -> float:
        modes = layer_modes(recompute, range(start, stop))
        again = sum(self.again_of[mode][unit] for unit, mode in zip(range(start, stop), modes, strict=True))
        return sum(self.seconds_of[start:stop]) + again

    def fits(self, stage: int, start: int, stop: int, recompute: StageRecompute) -> bool:
        modes = layer_modes(recompute, range(start, stop))
        saved = sum(self.saved_of[mode][unit] for unit, mode in zip(range(start, stop), modes, strict=True))
        return sum(self.state_of[start:stop]) + self.in_flight[stage] * saved <= self.limit


def made_up(draw: random.Random, num_units: int, num_stages: int, num_microbatches: int) -> MadeUp:
    """Some chains have many equal units, as models do; the limit lies between what little and what much recomputation needs."""
    kinds = draw.choice((1, 2, num_units))
    seconds = [draw.uniform(0.1, 2.0) for _ in range(kinds)]
    saved = [draw.uniform(0.5, 2.0) for _ in range(kinds)]
    some, most = draw.uniform(0, 0.3), draw.uniform(0.3, 0.6)
    kind_of = [draw.randrange(kinds) for _ in range(num_units)]

    def each(values: Sequence[float], ratio: float) -> tuple[float, ...]:
        return tuple(ratio * values[kind] for kind in kind_of)

    return MadeUp(
        seconds_of=each(seconds, 1.0),
        again_of={"none": each(seconds, 0.0), "selective": each(seconds, some), "full": each(seconds, most)},
        saved_of={"none": each(saved, 1.0), "selective": each(saved, 0.5), "full": each(saved, 0.1)},
        state_of=each(saved, draw.uniform(0, 1)),
        in_flight=tuple(min(num_stages - s, num_microbatches) for s in range(num_stages)),
        limit=draw.uniform(0.2, 2.5) * num_units,
    )


def all_cuts(costs: MadeUp, num_stages: int) -> Iterator[Cut]:
    """Every cut into stages that have units and fit, each by the quickest of all ways to recompute: none other makes a better cut."""
    for inner in itertools.combinations(range(1, costs.num_units), num_stages - 1):
        bounds = (0, *inner, costs.num_units)
        found = [costs.fitted(s, *run) for s, run in enumerate(itertools.pairwise(bounds))]
        fitted = [each for each in found if each is not None]
        if len(fitted) == num_stages:
            times = [each.seconds for each in fitted]
            yield Cut(bounds[:-1], tuple(each.recompute for each in fitted), max(times), sum(times))


@pytest.mark.parametrize("seed", range(8))
def test_the_cut_is_as_good_as_the_best_of_all(seed: int) -> None:
    draw = random.Random(seed)
    num_unfit = num_mixed = 0
    for _ in range(80):
        num_units = draw.randint(1, 7)
        num_stages, num_microbatches = draw.randint(1, min(4, num_units)), draw.choice((1, 2, 3, 8, 64))
        asked: tuple[StageRecompute | None, ...] = (None, None, None, "none", "full")
        costs = replace(made_up(draw, num_units, num_stages, num_microbatches), asked=draw.choice(asked))
        least_s = min((c.pipeline_s(num_microbatches) for c in all_cuts(costs, num_stages)), default=None)
        cut = best_cut(costs, num_stages, num_microbatches)
        assert (cut is None) == (least_s is None)
        if cut is None or least_s is None:
            num_unfit += 1
            continue
        assert cut.pipeline_s(num_microbatches) == pytest.approx(least_s, rel=1e-9)
        assert_is_what_it_says(costs, cut, num_stages)
        num_mixed += len(set(cut.recompute)) > 1
    assert num_unfit > 5 and num_mixed > 5


def assert_is_what_it_says(costs: MadeUp, cut: Cut, num_stages: int) -> None:
    assert len(cut.starts) == len(cut.recompute) == num_stages and cut.starts[0] == 0
    stops = (*cut.starts[1:], costs.num_units)
    times = []
    for stage, (start, stop, recompute) in enumerate(zip(cut.starts, stops, cut.recompute, strict=True)):
        assert start < stop and costs.fits(stage, start, stop, recompute)
        times.append(costs.seconds(start, stop, recompute))
    assert (cut.slowest_s, cut.total_s) == (pytest.approx(max(times)), pytest.approx(sum(times)))


def test_a_cut_that_may_be_any_because_none_is_fast_enough_is_no_faster() -> None:
    draw = random.Random(5)
    for _ in range(300):
        costs = made_up(draw, 6, 3, 8)
        exact = best_cut(costs, 3, 8)
        for ratio in (0.5, 0.99, 1.01):
            below_s = math.inf if exact is None else ratio * exact.pipeline_s(8)
            cut = best_cut(costs, 3, 8, below_s=below_s)
            assert ratio < 1 or (cut is None) == (exact is None)
            if cut is None or exact is None:
                continue
            assert cut.pipeline_s(8) >= exact.pipeline_s(8) * (1 - 1e-12)
            if ratio > 1:
                assert cut.pipeline_s(8) == pytest.approx(exact.pipeline_s(8))


def test_more_memory_is_never_slower_and_what_needs_no_recomputation_has_none() -> None:
    draw = random.Random(9)
    for _ in range(200):
        costs = made_up(draw, 7, 3, 8)
        times = []
        for limit in (0.5, 1.0, 2.0, 4.0, 100.0):
            cut = best_cut(replace(costs, limit=limit * costs.num_units), 3, 8)
            times.append(math.inf if cut is None else cut.pipeline_s(8))
        assert all(more <= less * (1 + 1e-12) for less, more in itertools.pairwise(times))
        assert cut is not None and set(cut.recompute) == {"none"}


def test_only_the_stages_that_hold_most_recompute() -> None:
    """Four equal units on four ranks: the first holds four microbatches, the last one."""
    zeros, ones = (0.0,) * 4, (1.0,) * 4
    costs = MadeUp(
        seconds_of=ones,
        again_of={"none": zeros, "selective": (0.1,) * 4, "full": (0.3,) * 4},
        saved_of={"none": ones, "selective": (0.6,) * 4, "full": (0.1,) * 4},
        state_of=zeros,
        in_flight=(4, 3, 2, 1),
        limit=2.0,
    )
    cut = best_cut(costs, 4, 8)
    assert cut is not None
    assert cut.starts == (0, 1, 2, 3)
    assert cut.recompute == ("full", "selective", "none", "none")
    assert (cut.slowest_s, cut.total_s) == (pytest.approx(1.3), pytest.approx(4.4))


def test_a_slower_stage_is_taken_where_the_others_then_recompute_less() -> None:
    """With one microbatch only the sum counts."""
    draw = random.Random(2)
    num_better = 0
    for _ in range(300):
        costs = made_up(draw, 6, 3, 1)
        cut = best_cut(costs, 3, 1)
        many = best_cut(costs, 3, 64)
        if cut is None or many is None:
            continue
        assert cut.total_s <= many.total_s * (1 + 1e-12)
        assert many.slowest_s <= cut.slowest_s * (1 + 1e-12)
        num_better += cut.slowest_s > many.slowest_s * 1.001
    assert num_better > 0
