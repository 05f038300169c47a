"""Cuts of several stages a rank leave the slowest rank as quick as the best cut does, where layers are alike."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from random import Random

import numpy as np
import pytest

from shardstage.planner.mixed.balance import balanced_on
from shardstage.schedule import stages_of_rank

Sums = list[list[float]]


def random_ranks(random: Random) -> tuple[list[float], list[int]]:
    """A speed of each rank, slower classes first, and the rank of each stage."""
    p, v = random.choice(((2, 2), (2, 3), (3, 2), (1, 3)))
    name = random.choice(("interleaved-1f1b", "zb-v")) if v == 2 else "interleaved-1f1b"
    ranks = [0] * (p * v)
    for rank in range(p):
        for stage in stages_of_rank(name, p * v, p, rank):
            ranks[stage] = rank
    return sorted(random.choice((1.0, 1.3, 2.2)) for _ in range(p)), ranks


def sums_of(units: Sequence[float], speeds: Sequence[float], ranks: Sequence[int]) -> Sums:
    return [np.concatenate([[0.0], np.cumsum(units) / speeds[rank]]).tolist() for rank in ranks]


@pytest.mark.parametrize("seed", range(60))
def test_no_cut_of_alike_layers_between_unlike_ends_is_better(seed: int) -> None:
    random = Random(seed)
    speeds, ranks = random_ranks(random)
    layers = [1.0] * random.randint(len(ranks) - 2, 11)
    sums = sums_of([random.uniform(0.02, 0.4), *layers, random.uniform(0.3, 3.0)], speeds, ranks)
    starts = balanced_on(sums, ranks)
    assert list(starts) == sorted({*starts}) and starts[0] == 0 and len(starts) == len(ranks)
    assert slowest(sums, ranks, starts) <= least_slowest(sums, ranks) * (1 + 1e-4)


def test_cuts_of_unlike_layers_are_off_by_less_than_a_percent_on_average() -> None:
    random, ratios = Random(0), []
    for _ in range(60):
        speeds, ranks = random_ranks(random)
        units = [random.uniform(0.6, 1.4) for _ in range(random.randint(len(ranks), 12))]
        sums = sums_of(units, speeds, ranks)
        ratios.append(slowest(sums, ranks, balanced_on(sums, ranks)) / least_slowest(sums, ranks))
    assert min(ratios) >= 1 - 1e-9 and np.mean(ratios) < 1.01


def test_what_a_slow_stage_cannot_take_whole_the_next_one_of_its_rank_does() -> None:
    """A third of the speed on the first rank: of 16 layers it may take four, a stage of one and one of three or so."""
    ranks = [0, 1, 0, 1]
    sums = sums_of([1.0] * 16, (1.0, 3.0), ranks)
    starts = balanced_on(sums, ranks)
    assert slowest(sums, ranks, starts) == pytest.approx(4.0)


def slowest(sums: Sums, ranks: Sequence[int], starts: Sequence[int]) -> float:
    stops = (*starts[1:], len(sums[0]) - 1)
    seconds = [0.0] * (max(ranks) + 1)
    for own, rank, start, stop in zip(sums, ranks, starts, stops, strict=True):
        seconds[rank] += own[stop] - own[start]
    return max(seconds)


def least_slowest(sums: Sums, ranks: Sequence[int]) -> float:
    inner = combinations(range(1, len(sums[0]) - 1), len(sums) - 1)
    return min(slowest(sums, ranks, (0, *starts)) for starts in inner)
