"""Cuts over unlike classes are as quick as any, also where a unit alone is too much for a slow one."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from random import Random

import pytest

from shardstage.planner.stages import Fitted, best_cut


@dataclass(frozen=True)
class Unlike:
    """Units of so many seconds on stages of so much speed."""

    units: tuple[float, ...]
    speeds: tuple[float, ...]
    has_unlike_stages: bool = True

    @property
    def num_units(self) -> int:
        return len(self.units)

    def plain_s(self, stage: int, start: int, stop: int) -> float:
        return sum(self.units[start:stop]) / self.speeds[stage]

    def fitted(self, stage: int, start: int, stop: int) -> Fitted:
        return Fitted(self.plain_s(stage, start, stop), "none")


@pytest.mark.parametrize("seed", range(40))
def test_a_cut_over_unlike_classes_is_as_quick_as_any(seed: int) -> None:
    random = Random(seed)
    num_stages = random.randint(2, 4)
    units = tuple(random.choice((1.0, 1.0, 2.0, 7.0)) for _ in range(random.randint(num_stages, 9)))
    costs = Unlike(units, tuple(random.choice((1.0, 2.5, 4.0)) for _ in range(num_stages)))
    found = best_cut(costs, num_stages, 8, counts_sum=False)
    least = min(slowest(costs, (0, *inner)) for inner in combinations(range(1, len(units)), num_stages - 1))
    assert found is not None and found.slowest_s == pytest.approx(least)
    assert slowest(costs, found.starts) == pytest.approx(found.slowest_s)


def test_a_stage_leaves_a_heavy_unit_to_a_faster_one_behind_a_slow_one() -> None:
    costs = Unlike((1.0, 1.0, 9.0), (2.0, 1.0, 9.0))
    found = best_cut(costs, 3, 8, counts_sum=False)
    assert found is not None and found.starts == (0, 1, 2)


def slowest(costs: Unlike, starts: tuple[int, ...]) -> float:
    stops = (*starts[1:], costs.num_units)
    return max(costs.plain_s(stage, *span) for stage, span in enumerate(zip(starts, stops, strict=True)))
