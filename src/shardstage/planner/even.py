"""``EvenCuts``: cuts into stages of equal seconds, for schedules that give each rank several, and of how many units of each kind they are.

A cut is the same for all choices: of what the units take one rank for one sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from shardstage.cost import balanced
from shardstage.schedule import SCHEDULES, stages_of_rank

__all__ = ["COUNTED_LAYERS", "EvenCuts", "EvenRanks", "unlike_pairs"]

Array = npt.NDArray[np.float64]

COUNTED_LAYERS: Final = 4
"""Stages of more layers than this are long: how many of them recompute is taken for a fraction."""


class EvenCuts:
    """``kinds`` are those of the units, numbered from 0, ``layers`` the layer of each, -1 outside of layers."""

    def __init__(self, kinds: Sequence[int], layers: Sequence[int], seconds: Sequence[float]) -> None:
        self._seconds = seconds
        self._layers = layers
        self._kinds = kinds
        self._starts: dict[int, tuple[int, ...]] = {}
        self._stages: dict[int, _Stages] = {}
        self._known: dict[tuple[str, int, int], _Ranks] = {}

    def starts(self, num_stages: int) -> tuple[int, ...]:
        """First unit of each stage."""
        if num_stages not in self._starts:
            self._starts[num_stages] = balanced(self._seconds, num_stages)
        return self._starts[num_stages]

    def ranks(self, schedule: str, num_ranks: Any, per_rank: Any) -> EvenRanks:
        """Of so many ranks and stages a rank under a schedule, [row] each."""
        sizes, row = unlike_pairs(num_ranks, per_rank)
        made = [self._made(schedule, p, v) for p, v in sizes]
        of_fullest = np.zeros((len(made), COUNTED_LAYERS + 2, max(len(each.stages) for each in made)))
        for number, ranks in enumerate(made):
            of_fullest[number, :, : len(ranks.stages)] = ranks.of_fullest
        return EvenRanks(
            row=row,
            each=_filled([ranks.each for ranks in made]),
            firsts=_filled([ranks.firsts for ranks in made]),
            stages=_filled([ranks.stages for ranks in made]),
            mean_firsts=np.array([ranks.firsts_of_all for ranks in made]),
            fullest=np.array([ranks.stages.sum(axis=0) for ranks in made]),
            most_layers=np.array([ranks.most_layers for ranks in made]),
            layers=np.array([ranks.layers for ranks in made]).transpose(1, 2, 0),
            layers_of_fullest=of_fullest.transpose(1, 0, 2),
        )

    def _made(self, schedule: str, p: int, v: int) -> _Ranks:
        places = SCHEDULES[schedule].places
        if (places, p, v) not in self._known:
            of_rank = np.array([stages_of_rank(schedule, p * v, p, rank) for rank in range(p)])
            counts, firsts, layers = (each[of_rank] for each in self._of_stages(p * v))
            counted, fullest = layers.sum(axis=1), p - 1 if places == "v" else 0
            self._known[places, p, v] = _Ranks(
                each=_ways(counts.sum(axis=1)),
                firsts=_ways(firsts.sum(axis=1)),
                stages=counts[fullest],
                firsts_of_all=firsts.sum(axis=(0, 1)) / p,
                most_layers=float(layers[:, :, -1].max()),
                layers=np.array([counted.mean(axis=0), counted.min(axis=0)]),
                of_fullest=layers[fullest].T,
            )
        return self._known[places, p, v]

    def _of_stages(self, num_stages: int) -> _Stages:
        if num_stages not in self._stages:
            starts = np.array([*self.starts(num_stages), len(self._kinds)])
            first, last, before = starts[:-1], starts[1:], self._counts_before
            begun, is_within = self._layers_before
            layers = begun[last] - begun[first] + is_within[first]
            limits = np.array([*range(COUNTED_LAYERS + 1), len(self._kinds)])
            self._stages[num_stages] = _Stages(
                before[last] - before[first],
                before[first + 1] - before[first],
                np.minimum(layers[:, None], limits),
            )
        return self._stages[num_stages]

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

    @cached_property
    def _counts_before(self) -> Array:
        """[unit, kind]: units of a kind before a unit."""
        ones = np.zeros((len(self._kinds) + 1, max(self._kinds) + 1))
        ones[np.arange(1, len(self._kinds) + 1), list(self._kinds)] = 1.0
        return ones.cumsum(axis=0)


class _Stages(NamedTuple):
    """[stage, …]: units of each kind, of which kind the first one is, and layers where at most so many count, a part of one as one."""

    counts: Array
    firsts: Array
    layers: Array


class _Ranks(NamedTuple):
    """Ranks of one size; what ``EvenRanks`` has of many."""

    each: Array
    firsts: Array
    stages: Array
    firsts_of_all: Array
    most_layers: float
    layers: Array
    of_fullest: Array


@dataclass(frozen=True, kw_only=True)
class EvenRanks:
    """Of how many units of each kind ranks are made, [size, …, kind]; ``row`` [row] is the size of each row.

    ``each`` are the ways in which ranks are made, each once; what is missing repeats the first. ``stages`` are those of the rank that
    surely holds most microbatches at once, the first where stages go round, the last in a V, and ``fullest`` their sum.
    ``firsts`` are the first units of the stages of each rank, in all ways, and ``mean_firsts`` those of a mean rank. ``most_layers`` are
    those of a stage, and ``layers`` [2, number, size] those of a mean rank, and of the one that has fewest, where of each stage at most so
    many count; in the last all do. ``layers_of_fullest`` [number, size, stage] are those of the stages in ``stages``.

    A figure of kinds is [kind, row], and what it adds up to [row].
    """

    row: Any
    each: Array
    stages: Array
    fullest: Array
    firsts: Array
    mean_firsts: Array
    most_layers: Array
    layers: Array
    layers_of_fullest: Array

    @property
    def num_stages(self) -> int:
        """Of the rank that has most."""
        return int(self.stages.shape[1])

    def least_first(self, of_kinds: Array) -> Array:
        """The least that the first units of a rank's stages add up to."""
        found: Array = self._of_ways(self.firsts, of_kinds).min(axis=1)
        return found

    def mean_first(self, of_kinds: Array) -> Array:
        """What the first units of the stages of a mean rank add up to."""
        return self._of_sizes(self.mean_firsts, of_kinds)

    def slowest(self, of_kinds: Array) -> Array:
        """The most that the units of a rank add up to."""
        found: Array = self._of_ways(self.each, of_kinds).max(axis=1)
        return found

    def of_fullest(self, of_kinds: Array) -> Array:
        """What the units of the fullest rank add up to."""
        return self._of_sizes(self.fullest, of_kinds)

    def stages_of_fullest(self, of_kinds: Array) -> Array:
        """What the units of each of its stages add up to, [row, stage]; the first for those that are missing."""
        return self._of_ways(self.stages, of_kinds)

    def most_of_fullest(self, of_kinds: Array) -> Array:
        """The most that one unit of it has."""
        found: Array = np.where(self.fullest[self.row].T > 0, of_kinds, 0.0).max(axis=0)
        return found

    def _of_sizes(self, counts: Array, of_kinds: Array) -> Array:
        found: Array = np.einsum("rk,kr->r", counts[self.row], of_kinds)
        return found

    def _of_ways(self, counts: Array, of_kinds: Array) -> Array:
        found: Array = np.einsum("rwk,kr->rw", counts[self.row], of_kinds)
        return found


def unlike_pairs(first: Any, second: Any) -> tuple[list[tuple[int, int]], Any]:
    """The pairs that two arrays of whole numbers, none below 0, make, each once, and [row] which of them a row has."""
    first, second = first.astype(np.int64), second.astype(np.int64)
    base = int(second.max(initial=0)) + 1
    keys, row = np.unique(first * base + second, return_inverse=True)
    return [divmod(key, base) for key in keys.tolist()], row


def _ways(found: Array) -> Array:
    """Each row once."""
    return np.array([*dict.fromkeys(map(tuple, found.tolist()))])


def _filled(found: Sequence[Array]) -> Array:
    """[size, way, kind]; where there are fewer ways, the first is repeated."""
    widest = max(map(len, found))
    return np.array(
        [np.concatenate([each, np.repeat(each[:1], widest - len(each), axis=0)]) for each in found]
    )
