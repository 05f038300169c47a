"""``EvenLane``: what a lane with several stages a rank takes and holds at least, from arrays of its cut.

All stages recompute their first f layers in full and those up to e selectively. At one moment a rank holds h_c microbatches on its stage c:

    Σ_c h_c (b_c - some_c(e) - more_c(f)) <= limit - state         for each f the least e, of the ranks that are asked the most
    pipeline >= min over f of the formula of its schedule at (f, e(f))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from shardstage.cost import StepSetup
from shardstage.cost.accounting import OUR_ACCOUNTING
from shardstage.cost.pipeline import each_bubble_s
from shardstage.cost.profile import RECOMPUTES
from shardstage.planner.chain import Chain, state_bytes_of
from shardstage.schedule import held_in_rounds, stages_of_rank

__all__ = ["EvenCut", "EvenLane", "Sums", "uneven_pipeline_s"]

Array = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]


class EvenLane:
    """``sums`` are by class; of ``setup`` only the schedule and the microbatches count, beside its ``cut``. Adding an element's gradient to
    its sum takes ``summing_s`` at most."""

    def __init__(self, sums: Mapping[int, Sums], cut: EvenCut, setup: StepSetup, summing_s: float) -> None:
        self._sums, self._cut, self._setup = sums, cut, setup
        forward, backward = self._by_rank("forward_s"), self._by_rank("backward_s")
        self._forward, self._backward = float(forward.sum()), float(backward.sum())
        self._weight = float(self._by_rank("weight_s").sum() + summing_s * self._by_rank("summed").sum())
        self._seconds = forward + backward
        self.plain_s = float(self._pipeline_s(self._seconds.max(), self._backward))
        """The pipeline where nothing is recomputed."""

    def _by_rank(self, name: str) -> Array:
        """[rank]: what a figure of its stages adds up to."""
        cut, found = self._cut, np.zeros(len(self._cut.classes))
        for number, rows, starts, stops, _ in cut.parts:
            sums = getattr(self._sums[number], name)
            found[rows] = (sums[stops] - sums[starts]).sum(axis=1)
        return found

    @cached_property
    def _again(self) -> tuple[Array, Array]:
        """[rank, layers]: seconds of selective recomputation of so many layers of each stage, and how much longer full takes."""
        shape = (len(self._cut.classes), self._cut.num_ends)
        some, more = np.empty(shape), np.empty(shape)
        for number, rows, starts, _, ends in self._cut.parts:
            for found, sums in ((some, self._sums[number].some_s), (more, self._sums[number].more_s)):
                found[rows] = (sums[ends] - sums[starts][..., None]).sum(axis=1)
        return some, more

    @cached_property
    def _ranks(self) -> list[_Rank]:
        return [_Rank(self._sums, self._cut, self._setup, rank) for rank in self._cut.asked]

    def least_s(self, setup: StepSetup, limits: Sequence[int]) -> float:
        """Seconds of the pipeline at least under a ZeRO, with what some ranks must recompute; infinite where they cannot fit."""
        most = self._cut.num_ends
        ends = np.arange(most)
        for rank in self._ranks:
            ends = np.maximum(ends, rank.least_ends(setup, limits))
        if not ends[0]:
            return self.plain_s
        full = np.flatnonzero(ends < most)
        if not len(full):
            return float("inf")
        some, more = self._again
        again = more[:, full] + some[:, ends[full]]
        slowest = (self._seconds[:, None] + again).max(axis=0)
        return float(self._pipeline_s(slowest, self._backward + again.sum(axis=0)).min())

    def _pipeline_s(self, slowest: Any, backward: Any) -> Any:
        of, p = self._setup, self._setup.mesh.pp
        v = of.num_stages // p
        sums = (self._forward, backward, self._weight)
        return uneven_pipeline_s(of.schedule, v, slowest, *sums, p, of.num_microbatches)


class Sums:
    """A chain's sums over units as arrays: bytes and seconds of selective recomputation, and what full does beyond that."""

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self.forward_s, self.backward_s = np.array(chain.forward_s), np.array(chain.backward_s)
        self.weight_s, self.summed = np.array(chain.weight_s), np.array(chain.summed)
        self.some_s = np.array(chain.recompute_s["selective"])
        self.more_s = np.array(chain.recompute_s["full"]) - self.some_s
        self.saved = np.array(chain.saved["none"])
        selective = np.array(chain.saved["selective"])
        self.some, self.more = self.saved - selective, selective - np.array(chain.saved["full"])
        units = {id(unit): unit for unit in chain.kinds}
        least = {
            key: unit.transient_bytes + min(unit.kept[mode].extra_bytes for mode in RECOMPUTES)
            for key, unit in units.items()
        }
        self.passing = np.array([least[id(unit)] for unit in chain.profile.units])


class EvenCut:
    """Which units the ranks of a lane run: ``parts`` are of each class its ranks, and [rank, stage] where their stages start, stop, and
    where so many of their layers end."""

    def __init__(self, chain: Chain, classes: Sequence[int], setup: StepSetup) -> None:
        p, starts = setup.mesh.pp, np.array(setup.starts)
        self.classes = classes
        self.starts, self.stops = starts, np.array([*setup.starts[1:], chain.num_units])
        self.of_rank = np.array([stages_of_rank(setup.schedule, len(starts), p, rank) for rank in range(p)])
        self.ends = _ends_of(chain, setup.starts, chain.num_units)
        self.num_ends = self.ends.shape[1]
        self.asked = sorted({*map(classes.index, classes), p - 1})
        self.parts = []
        for number in sorted({*classes}):
            rows = np.flatnonzero(np.array(classes) == number)
            stages = self.of_rank[rows]
            self.parts.append((number, rows, starts[stages], self.stops[stages], self.ends[stages]))


class _Rank:
    """What a rank keeps at a moment: less where so many layers recompute, and less where so many do in full."""

    def __init__(self, all_sums: Mapping[int, Sums], cut: EvenCut, setup: StepSetup, rank: int) -> None:
        self._number = cut.classes[rank]
        sums = all_sums[self._number]
        self._chain = chain = sums.chain
        stages = cut.of_rank[rank]
        starts, stops, ends = cut.starts[stages], cut.stops[stages], cut.ends[stages]
        self._spans = [*zip(starts.tolist(), stops.tolist(), strict=True)]
        held = _held(setup, rank)
        received = [chain.received[start] if start else 0 for start, _ in self._spans]
        kept = sums.saved[stops] - sums.saved[starts]
        if OUR_ACCOUNTING.has_own_receives:
            kept = kept + received
        passing = max(float(sums.passing[start:stop].max()) for start, stop in self._spans)
        posted = sum(chain.received[at] for span in self._spans for at in span if 0 < at < chain.num_units)
        self._bytes = float(held @ kept) + passing + OUR_ACCOUNTING.num_posted_receives * posted
        self._some, self._more = (
            np.maximum.accumulate(held @ (each[ends] - each[starts][:, None]))
            for each in (sums.some, sums.more)
        )

    def least_ends(self, setup: StepSetup, limits: Sequence[int]) -> Numbers:
        """[layers in full]: how many must recompute at all; more than there are where that is not enough."""
        state_bytes = state_bytes_of(self._chain, setup)
        state = sum(state_bytes(*span) for span in self._spans)
        missing = self._bytes + state - limits[self._number] - self._more
        found: Numbers = np.searchsorted(self._some, missing - 1)
        return found


def _ends_of(chain: Chain, starts: Sequence[int], num_units: int) -> Numbers:
    """[stage, layers]: where so many layers of a stage end; one without layers has all of it as its last."""
    spans = zip(starts, (*starts[1:], num_units), strict=True)
    each = [chain.layers.ends(*span) for span in spans]
    most = max(map(len, each))
    stops = (*starts[1:], num_units)
    return np.array(
        [
            [*ends, *[ends[-1]] * (most - len(ends) - 1), stop][:most]
            for ends, stop in zip(each, stops, strict=True)
        ]
    )


def _held(setup: StepSetup, rank: int) -> Array:
    """[stage of the rank]: microbatches that it holds at a moment at which it is as full as it gets, or nearly."""
    p, m, v = setup.mesh.pp, setup.num_microbatches, setup.num_stages // setup.mesh.pp
    if setup.schedule == "interleaved-1f1b":
        return np.asarray(held_in_rounds(p, m, v, rank, np.arange(v)), dtype=np.float64)
    return np.array(max(setup.in_flight_together(rank), key=sum), dtype=np.float64)


def uneven_pipeline_s(
    schedule: str, v: int, slowest: Any, forward: Any, backward: Any, weight: Any, p: Any, m: Any
) -> Any:
    """``cost.pipeline`` of schedules whose bubble is of mean stages, v a rank; ``slowest`` is of ranks, the others are sums."""
    bubble = each_bubble_s(schedule, v, forward / (p * v), backward / (p * v), weight / (p * v), p, m)
    return m * slowest + np.where(p > 1, bubble, 0.0)
