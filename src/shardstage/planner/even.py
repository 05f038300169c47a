"""``EvenCuts``: cuts into stages of equal seconds, for schedules that give each rank several, and of how many units of each kind they are.

A cut is the same for all choices: of what the units take one rank for one sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from shardstage.cost import balanced
from shardstage.schedule import SCHEDULES, stages_of_rank

__all__ = ["COUNTED_LAYERS", "EvenCuts", "RankTable"]

Array = npt.NDArray[np.float64]

COUNTED_LAYERS: Final = 4
"""Stages of more layers than this are long: how many of them recompute is taken for a fraction."""


class EvenCuts:
    """``kinds`` are those of the units, numbered from 0, ``layers`` the layer of each, -1 outside of layers, ``seconds`` what each takes;
    a rank has ``most_per_rank`` stages at most."""

    def __init__(
        self, kinds: Sequence[int], layers: Sequence[int], seconds: Sequence[float], most_per_rank: int
    ) -> None:
        self._seconds = seconds
        self._layers = layers
        self._kinds = kinds
        self._most_per_rank = most_per_rank
        self._starts: dict[int, tuple[int, ...]] = {}
        self._tables: dict[str, RankTable] = {}

    def starts(self, num_stages: int) -> tuple[int, ...]:
        """First unit of each stage."""
        if num_stages not in self._starts:
            self._starts[num_stages] = balanced(self._seconds, num_stages)
        return self._starts[num_stages]

    @cached_property
    def whole(self) -> Array:
        """[kind]: how many units there are of each."""
        found: Array = self._counts_before[-1]
        return found

    def ranks(self, schedule: str) -> RankTable:
        """Of all numbers of ranks and of stages a rank under a schedule."""
        places = SCHEDULES[schedule].places
        if places not in self._tables:
            self._tables[places] = self._made(schedule)
        return self._tables[places]

    def _made(self, schedule: str) -> RankTable:
        n, num_kinds = len(self._kinds), len(self.whole)
        is_v = SCHEDULES[schedule].places == "v"
        most = 2 if is_v else max(2, min(self._most_per_rank, n // 2))
        sizes = [(p, v) for v in range(2, most + 1) for p in range(2, n // v + 1)]
        place = np.zeros((n + 1, most + 1), dtype=np.int64)
        each: list[list[tuple[float, ...]]] = [[(0.0,) * num_kinds]]
        firsts: list[list[tuple[float, ...]]] = [[(0.0,) * num_kinds]]
        stages = np.zeros((len(sizes) + 1, most, num_kinds))
        is_stage = np.zeros((len(sizes) + 1, most))
        mean_firsts = np.zeros((len(sizes) + 1, num_kinds))
        most_layers = np.ones(len(sizes) + 1)
        limits = np.array([*range(COUNTED_LAYERS + 1), n])[:, None]
        layers = np.zeros((2, len(sizes) + 1, COUNTED_LAYERS + 2))
        of_fullest = np.zeros((COUNTED_LAYERS + 2, len(sizes) + 1, most))
        for row, (p, v) in enumerate(sizes, start=1):
            place[p, v] = row
            of_rank = [list(stages_of_rank(schedule, p * v, p, rank)) for rank in range(p)]
            of_ranks, of_firsts = self._stage_counts(p * v)[of_rank], self._first_counts(p * v)[of_rank]
            each.append(list(dict.fromkeys(map(tuple, of_ranks.sum(axis=1).tolist()))))
            firsts.append(list(dict.fromkeys(map(tuple, of_firsts.sum(axis=1).tolist()))))
            mean_firsts[row] = of_firsts.sum(axis=(0, 1)) / p
            of_stages = self._num_layers(p * v)
            most_layers[row] = of_stages.max()
            of_each = np.minimum(of_stages[None], limits)[:, of_rank]
            counted = of_each.sum(axis=2)
            layers[0, row], layers[1, row] = counted.mean(axis=1), counted.min(axis=1)
            fullest = p - 1 if is_v else 0
            of_fullest[:, row, :v] = of_each[:, fullest]
            stages[row] = of_ranks[fullest, [*range(v), *([0] * (most - v))]]
            is_stage[row, :v] = 1.0
        return RankTable(
            place,
            _padded(each),
            stages,
            is_stage,
            _padded(firsts),
            mean_firsts,
            most_layers,
            layers,
            of_fullest,
        )

    def _num_layers(self, num_stages: int) -> Array:
        """[stage]: how many layers each has, a part of one counting as one."""
        starts = np.array([*self.starts(num_stages), len(self._layers)])
        begun, is_within = self._layers_before
        found: Array = begun[starts[1:]] - begun[starts[:-1]] + is_within[starts[:-1]]
        return found

    @cached_property
    def _layers_before(self) -> tuple[Array, Array]:
        """[unit]: how many layers begin before it, and 1 where one that began before goes on in it."""
        begins = [layer != before and layer >= 0 for before, layer in pairwise((-1, *self._layers))]
        goes_on = [layer == before and layer >= 0 for before, layer in pairwise((-1, *self._layers))]
        return np.array([0, *accumulate(begins)], dtype=np.float64), np.array(goes_on, dtype=np.float64)

    @cached_property
    def layer_kinds(self) -> list[int]:
        """Which kinds of units are layers; none where a layer has several units, of which a stage may have some."""
        inside = [(kind, layer) for kind, layer in zip(self._kinds, self._layers, strict=True) if layer >= 0]
        is_cut = len(inside) > len({layer for _, layer in inside})
        return [] if is_cut else sorted({kind for kind, _ in inside})

    def _stage_counts(self, num_stages: int) -> Array:
        """[stage, kind]"""
        starts = self.starts(num_stages)
        before = self._counts_before
        found: Array = before[[*starts[1:], len(self._kinds)]] - before[list(starts)]
        return found

    def _first_counts(self, num_stages: int) -> Array:
        """[stage, kind]: of which kind the first unit of each stage is."""
        starts = np.array(self.starts(num_stages))
        found: Array = self._counts_before[starts + 1] - self._counts_before[starts]
        return found

    @cached_property
    def _counts_before(self) -> Array:
        """[unit, kind]: units of a kind before a unit."""
        ones = np.zeros((len(self._kinds) + 1, max(self._kinds) + 1))
        ones[np.arange(1, len(self._kinds) + 1), list(self._kinds)] = 1.0
        return ones.cumsum(axis=0)


@dataclass(frozen=True)
class RankTable:
    """Of how many units of each kind ranks are made, [row, …, kind]; ``place`` [ranks, stages a rank] is the row, 0 where there are too few
    units, which is empty.

    ``each`` are the ways in which ranks are made, each once; what is missing repeats the first. ``stages`` are those of the rank that
    surely holds most microbatches at once, the first where stages go round, the last in a V; ``is_stage`` tells them from repeated ones.
    ``firsts`` are the first units of the stages of each rank, in all ways, and ``mean_firsts`` those of a mean rank. ``most_layers`` are
    those of a stage, and ``layers`` [2, row, number] those of a mean rank, and of the one that has fewest, where of each stage at most so
    many count; in the last column all do. ``layers_of_fullest`` [number, row, stage] are those of the stages in ``stages``.
    """

    place: Any
    each: Array
    stages: Array
    is_stage: Array
    firsts: Array
    mean_firsts: Array
    most_layers: Array
    layers: Array
    layers_of_fullest: Array

    def least_first(self, of_kinds: Array) -> Array:
        """[row, group]: the least that the first units of a rank's stages add up to, of a figure [kind, group]."""
        found: Array = (self.firsts @ of_kinds).min(axis=1)
        return found

    def mean_first(self, of_kinds: Array) -> Array:
        """What the first units of the stages of a mean rank add up to."""
        found: Array = self.mean_firsts @ of_kinds
        return found

    def slowest(self, of_kinds: Array) -> Array:
        """The most that the units of a rank add up to."""
        found: Array = (self.each @ of_kinds).max(axis=1)
        return found

    def of_fullest(self, of_kinds: Array) -> Array:
        """What the units of the fullest rank add up to."""
        found: Array = (self.stages * self.is_stage[:, :, None]).sum(axis=1) @ of_kinds
        return found

    def stages_of_fullest(self, of_kinds: Array) -> Array:
        """What the units of each of its stages add up to, [row, group, stage]."""
        found: Array = (self.stages @ of_kinds).transpose(0, 2, 1)
        return found

    def most_of_fullest(self, of_kinds: Array) -> Array:
        """The most that one unit of it has."""
        has = (self.stages > 0).max(axis=1)[:, :, None]
        found: Array = np.where(has, of_kinds[None], 0.0).max(axis=1)
        return found


def _padded(ways: Sequence[Sequence[tuple[float, ...]]]) -> Array:
    """[row, way, kind]; where there are fewer ways, the first is repeated."""
    widest = max(map(len, ways))
    return np.array([[*found, *[found[0]] * (widest - len(found))] for found in ways])
