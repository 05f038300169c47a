"""``Layers``: which of a stage's layers recompute, and how, so that memory holds it and the least seconds are added.

    of L layers the first f recompute in full, those up to e selectively, the others not        0 <= f <= e <= L

    minimise   A(f) + B(e)                               A seconds of full beyond selective, B of selective recomputation
    where      h (K - X(f) - Y(e)) + P(f, e) <= room     K bytes that h microbatches in flight keep without, X and Y what that spares,
                                                         P what the costliest unit brings back and works with

A knapsack whose two sums go apart: for each f the least e is found by bisection, and f rises no further than to where no layer is
selective. Where recomputation spares nothing in some layer, every e is tried instead.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from shardstage.graph.recompute import PartialRecompute, Recompute, StageRecompute, counted

__all__ = ["Layers", "Least", "Runs"]


class Runs(NamedTuple):
    """A stage of the units start..stop-1: those before ``full`` recompute in full, those before ``selective`` selectively."""

    start: int
    full: int
    selective: int
    stop: int


class Least(NamedTuple):
    """What a stage recomputes, and for how many seconds."""

    recompute: StageRecompute
    again_s: float


class Layers:
    """The layers of a chain of units. ``saved`` and ``again_s`` are sums over the units before each one, bytes and seconds by mode.

    ``most_passing`` (mode, start, stop) are the most bytes that a unit of a run brings back and works with; ``layers`` names the layer of
    each unit, -1 outside of layers.
    """

    def __init__(
        self,
        layers: Sequence[int],
        saved: Mapping[Recompute, Sequence[float]],
        again_s: Mapping[Recompute, Sequence[float]],
        most_passing: Callable[[Recompute, int, int], float],
    ) -> None:
        self._again_s = again_s
        self._most_passing = most_passing
        self._none = saved["none"]
        self._some = [a - b for a, b in zip(saved["none"], saved["selective"], strict=True)]
        self._more = [a - b for a, b in zip(saved["selective"], saved["full"], strict=True)]
        self._ends: dict[tuple[int, int], list[int]] = {}
        self._starts, self._are_within = [], []
        before = -1
        for unit, layer in enumerate(layers):
            self._are_within.append(layer == before != -1)
            if layer not in (-1, before):
                self._starts.append(unit)
                before = layer
        ends = (0, *self._starts[1:], len(layers))
        self._always_spares = all(
            sums[a] <= sums[b] for sums in (self._some, self._more) for a, b in pairwise(ends)
        )

    def ends(self, start: int, stop: int) -> list[int]:
        """Where the stage begins, each layer but the first begins, and the stage ends; what lies outside goes with the layer before."""
        if (start, stop) not in self._ends:
            self._ends[start, stop] = self._found_ends(start, stop)
        return self._ends[start, stop]

    def _found_ends(self, start: int, stop: int) -> list[int]:
        first = bisect_left(self._starts, start)
        following = first if self._are_within[start] else first + 1
        inner = self._starts[following : bisect_left(self._starts, stop)]
        has_layers = following == first or (first < len(self._starts) and self._starts[first] < stop)
        return [start, *inner, stop] if has_layers else [start]

    def runs(self, recompute: StageRecompute, start: int, stop: int) -> Runs:
        """The runs of units of a stage."""
        if not isinstance(recompute, PartialRecompute):
            return Runs(
                start, stop if recompute == "full" else start, start if recompute == "none" else stop, stop
            )
        ends = self.ends(start, stop)
        last = len(ends) - 1
        full = min(recompute.full, last)
        selective = last if recompute.selective is None else min(full + recompute.selective, last)
        return Runs(start, ends[full], ends[selective], stop)

    def again_s(self, runs: Runs) -> float:
        """Seconds of recomputation."""
        full, selective = self._again_s["full"], self._again_s["selective"]
        return full[runs.full] - full[runs.start] + selective[runs.selective] - selective[runs.full]

    def kept_bytes(self, runs: Runs) -> float:
        """What one microbatch keeps."""
        some, more = self._some, self._more
        spared = some[runs.selective] - some[runs.start] + more[runs.full] - more[runs.start]
        return self._none[runs.stop] - self._none[runs.start] - spared

    def passing_bytes(self, runs: Runs) -> float:
        """The most that a unit brings back and works with."""
        start, full, selective, stop = runs
        of_full = self._most_passing("full", start, full) if start < full else 0
        of_selective = self._most_passing("selective", full, selective) if full < selective else 0
        of_none = self._most_passing("none", selective, stop) if selective < stop else 0
        return max(of_full, of_selective, of_none)

    def least(self, start: int, stop: int, held: int, room_bytes: float) -> Least | None:
        """What is recomputed where ``held`` microbatches and what passes may take so many bytes; None where it cannot be made to fit."""
        none, some, more = self._none, self._some, self._more
        passing = self._most_passing("none", start, stop)
        spared = none[stop] - none[start] - (room_bytes - passing) / held
        if spared <= 0:
            return Least("none", 0.0)
        ends = self.ends(start, stop)
        if len(ends) == 1:
            return None
        first = 0
        if self._always_spares:
            if spared > some[stop] - some[start] + more[stop] - more[start]:
                return None
            needed = spared - (some[stop] - some[start]) + more[start]
            first = bisect_left(ends, needed, key=more.__getitem__)
        found, found_s = None, math.inf
        stage = _Stage(ends, held, room_bytes, passing, self._most_passing("full", start, stop))
        for full in range(first, len(ends)):
            end = self._least_end(stage, full)
            if end is None:
                continue
            seconds = self.again_s(Runs(start, ends[full], ends[end], stop))
            if seconds < found_s:
                found, found_s = (full, end - full), seconds
            if end == full:
                break
        return found and Least(counted(*found, len(ends) - 1), found_s)

    def _least_end(self, stage: _Stage, full: int) -> int | None:
        """How many layers recompute at all, where so many do in full."""
        ends, held, room_bytes, passing, most = stage
        start, stop, some = ends[0], ends[-1], self._some
        passing = max(passing, self._most_passing("full" if full else "selective", start, ends[1]))
        kept = (
            self._none[stop] - self._none[start] - (self._more[ends[full]] - self._more[start]) + some[start]
        )
        end = full
        if self._always_spares:
            end = bisect_left(ends, kept - (room_bytes - passing) / held, lo=full, key=some.__getitem__)
        for last in range(end, len(ends)):
            kept_bytes = held * (kept - some[ends[last]])
            if kept_bytes + most <= room_bytes:
                return last
            if kept_bytes + passing <= room_bytes:
                runs = Runs(start, ends[full], ends[last], stop)
                if kept_bytes + self.passing_bytes(runs) <= room_bytes:
                    return last
        return None


class _Stage(NamedTuple):
    """A stage whose recomputation is looked for: ``passing_bytes`` pass at least, ``most_bytes`` at most."""

    ends: Sequence[int]
    held: int
    room_bytes: float
    passing_bytes: float
    most_bytes: float
