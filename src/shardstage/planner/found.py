"""``Found``: what a search has priced so far; ``Walk``: bounded choices that are still open."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeVar

import numpy as np

from shardstage.cost import Prediction
from shardstage.layout import Mesh
from shardstage.planner.bounds import Bounds
from shardstage.planner.certificate import Counts
from shardstage.planner.pricing import Priced, TooSlow
from shardstage.planner.space import Choice

__all__ = ["KEPT_RUNNERS_UP", "Found", "Walk", "mesh_key", "pareto"]

KEPT_RUNNERS_UP: Final = 6
"""Of choices that were priced, so many of different meshes are kept to show what comes after the best."""


class Walk:
    """Bounded choices that are still open, best bound first."""

    def __init__(self, bounds: Bounds, order: Any) -> None:
        self._bounds = bounds
        self._order = order
        self._at = 0

    @staticmethod
    def of(bounds: Bounds, limit_bytes: float, below_s: float = math.inf) -> Walk:
        """Those that may fit and take less than so long."""
        seconds = bounds.seconds.ravel()
        is_open = np.isfinite(seconds) & (bounds.least_bytes.ravel() <= limit_bytes) & (seconds < below_s)
        open_ones = np.flatnonzero(is_open)
        return Walk(bounds, open_ones[np.argsort(seconds[open_ones], kind="stable")])

    @property
    def num_left(self) -> int:
        return len(self._order) - self._at

    def prefer(self, num_bytes: float) -> None:
        """Those first whose bound on memory is no more than this, best bound first in either part."""
        left = self._order[self._at :]
        seconds, least_bytes = (
            each.ravel()[left] for each in (self._bounds.seconds, self._bounds.least_bytes)
        )
        self._order, self._at = left[np.lexsort((left, seconds, least_bytes > num_bytes))], 0

    @property
    def least_s(self) -> float:
        """The bound of the next one; infinite where there is none."""
        return float(self._bounds.seconds.flat[self._order[self._at]]) if self.num_left else math.inf

    def next(self) -> Choice:
        self._at += 1
        return self._bounds.choice(int(self._order[self._at - 1]))


MeshKey = tuple[int, int, int, int]


def mesh_key(mesh: Mesh, ep: int) -> MeshKey:
    """What makes two plans alike to a reader: tp, pp, cp and ep."""
    return mesh.tp, mesh.pp, mesh.cp, ep


@dataclass
class Found:
    """The state of a search: the best so far, the best of other meshes, and how choices were dealt with. ``scouted`` were priced before
    that."""

    best: Priced | None = None
    counts: Counts = field(default_factory=Counts)
    least_pruned_s: float = math.inf
    by_mesh: dict[MeshKey, Priced] = field(default_factory=dict)
    slower: dict[MeshKey, TooSlow] = field(default_factory=dict)
    least_bytes: float = math.inf
    front: list[Priced] = field(default_factory=list)
    scouted: dict[Choice, Priced | TooSlow | None] = field(default_factory=dict)

    @property
    def best_s(self) -> float:
        return math.inf if self.best is None else self.best.seconds

    def seconds_of(self, mesh: MeshKey) -> float:
        """The best price so far of a mesh."""
        return self.by_mesh[mesh].seconds if mesh in self.by_mesh else math.inf

    def prune(self, least_s: float, number: int) -> None:
        """Leaves out so many choices, of which none takes less."""
        if number:
            self.counts.by_bound += number
            self.least_pruned_s = min(self.least_pruned_s, least_s)

    def take(self, outcome: Priced | TooSlow | None) -> None:
        """What pricing a choice has found, None where it does not fit."""
        if isinstance(outcome, TooSlow):
            self._add_slower(outcome)
        elif outcome is not None:
            self.add(outcome)

    def _add_slower(self, slower: TooSlow) -> None:
        key = mesh_key(slower.choice.mesh, slower.choice.group.ep)
        if slower.seconds < math.inf and (
            key not in self.slower or slower.seconds < self.slower[key].seconds
        ):
            self.slower[key] = slower

    def add(self, priced: Priced) -> None:
        key = mesh_key(priced.choice.mesh, priced.choice.group.ep)
        if key not in self.by_mesh or priced.seconds < self.by_mesh[key].seconds:
            self.by_mesh[key] = priced
        if priced.seconds < self.best_s:
            self.best = priced
        self.front = pareto([*self.front, priced])

    def runners_up(self) -> list[Priced]:
        others = [priced for priced in self.by_mesh.values() if priced is not self.best]
        return heapq.nsmallest(KEPT_RUNNERS_UP, others, key=lambda priced: priced.seconds)


class _IsPriced(Protocol):
    """A choice with its price."""

    @property
    def seconds(self) -> float: ...
    @property
    def prediction(self) -> Prediction: ...


def _peak_bytes(priced: _IsPriced) -> float:
    return priced.prediction.peak_bytes


AnyPriced = TypeVar("AnyPriced", bound=_IsPriced)


def pareto(found: Iterable[AnyPriced], held: Callable[[AnyPriced], float] = _peak_bytes) -> list[AnyPriced]:
    """Those that no other beats in both time and memory, fastest first. ``held`` is what counts as memory."""
    kept: list[AnyPriced] = []
    for priced in sorted(found, key=lambda each: (each.seconds, held(each))):
        if not kept or held(priced) < held(kept[-1]):
            kept.append(priced)
    return kept
