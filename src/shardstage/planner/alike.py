"""``Alike``: the least that stages recompute, as many layers in each of them, so that every rank's memory holds it.

For schedules that give each rank several stages, whose activations do not peak together. Ranks bind one after the other: what those need
that were found too full is solved, and asked of all; it differs between ranks by little.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from operator import mul

from shardstage.cost import MemoryModel, Profile, StepSetup
from shardstage.cost.accounting import OUR_ACCOUNTING
from shardstage.graph.recompute import StageRecompute, counted
from shardstage.planner.recompute import Layers

__all__ = ["Alike"]


class Alike:
    """Stages of one cut under a limit, or under one for each rank; ``setup`` holds their starts."""

    def __init__(
        self, profile: Profile, layers: Layers, setup: StepSetup, limit_bytes: int | Sequence[int]
    ) -> None:
        self._setup = setup
        self._profile = profile
        self._layers = layers
        self._limits = [limit_bytes] * setup.mesh.pp if isinstance(limit_bytes, int) else limit_bytes
        self._binding: dict[int, _Rank] = {}
        self._spans = list(pairwise((*setup.starts, len(profile.units))))
        self._most = max(len(layers.ends(*span)) for span in self._spans) - 1

    def setup(self, recompute: StageRecompute) -> StepSetup:
        """With stages that recompute so."""
        return replace(self._setup, recompute=recompute)

    def within(self, recompute: StageRecompute) -> MemoryModel | None:
        """What each rank holds; None as soon as one of them, those at the ends first, exceeds the limit: from then on it binds."""
        memory, last = MemoryModel(self._profile, self.setup(recompute)), self._setup.mesh.pp - 1
        for rank in (last, 0, *range(1, last)):
            if memory.rank(rank).total_bytes > self._limits[rank]:
                assert rank not in self._binding, "what fits by its own figures fits"
                self._binding[rank] = self._rank(memory, rank, recompute)
                return None
        return memory

    def assume(self, rank: int, state_bytes_of: Callable[[int, int], float]) -> None:
        """Binds a rank before ``within`` has asked what it holds: of state so much in each of its runs of units."""
        stages, units = self._setup.stages_of(rank), self._profile.units
        spans = [self._spans[stage] for stage in stages]
        ends = [[units[at].input_bytes if 0 < at < len(units) else 0 for at in span] for span in spans]
        posted = OUR_ACCOUNTING.num_posted_receives * sum(map(sum, ends))
        self._binding[rank] = _Rank(
            spans=spans,
            moments=self._setup.in_flight_together(rank),
            beside_bytes=[received for received, _ in ends],
            state_bytes=sum(state_bytes_of(*span) for span in spans) + posted,
        )

    def least(self) -> StageRecompute | None:
        """What lets all ranks fit that bind, with the least seconds of recomputation in all."""
        return next(iter(self.options()), None)

    def options(self) -> list[StageRecompute]:
        """All that lets the ranks fit that bind and recomputes nothing in vain, least seconds first; by bisection, as beyond a first layer
        more never takes more memory."""
        most = self._most
        if self._fits(0, 0):
            return ["none"]
        in_full = _first(1, most + 1, lambda full: self._fits(full, full))
        found = [(in_full, in_full)] if in_full <= most else []
        beside = 0 if self._fits(0, most) else _first(1, in_full, lambda full: self._fits(full, most))
        for full in range(beside, min(in_full, most + 1)):
            if self._fits(full, most):
                found.append((full, _first(full + 1, most, partial(self._fits, full))))
        found.sort(key=lambda each: self._again_s(*each))
        return [counted(full, end - full, most) for full, end in found]

    def _fits(self, full: int, end: int) -> bool:
        """Whether so many layers in full, and those up to an end selectively, let the ranks that bind fit."""
        recompute = counted(full, end - full, self._most)
        return all(
            of_rank.peak_bytes(self._layers, recompute) <= self._limits[rank]
            for rank, of_rank in self._binding.items()
        )

    def _again_s(self, full: int, end: int) -> float:
        recompute = counted(full, end - full, self._most)
        return sum(self._layers.again_s(self._layers.runs(recompute, *span)) for span in self._spans)

    def _rank(self, memory: MemoryModel, rank: int, recompute: StageRecompute) -> _Rank:
        setup, use = memory.setup, memory.rank(rank)
        stages = setup.stages_of(rank)
        spans = [self._spans[stage] for stage in stages]
        kept = [self._layers.kept_bytes(self._layers.runs(recompute, *span)) for span in spans]
        held = [memory.stage(stage).activations / max(1, setup.in_flight(stage)) for stage in stages]
        return _Rank(
            spans=spans,
            moments=setup.in_flight_together(rank),
            beside_bytes=[of_one - own for of_one, own in zip(held, kept, strict=True)],
            state_bytes=use.total_bytes - use.activations - use.recompute - use.transient,
        )


@dataclass(frozen=True, kw_only=True)
class _Rank:
    """``cost.memory`` of a rank as a function of what its stages recompute: units of its ``spans``, microbatches held at its ``moments``.

    A microbatch takes ``beside_bytes`` of a stage that no unit keeps.
    """

    spans: Sequence[tuple[int, int]]
    moments: tuple[tuple[int, ...], ...]
    beside_bytes: Sequence[float]
    state_bytes: float

    def peak_bytes(self, layers: Layers, recompute: StageRecompute) -> float:
        runs = [layers.runs(recompute, *span) for span in self.spans]
        held = [layers.kept_bytes(run) + own for run, own in zip(runs, self.beside_bytes, strict=True)]
        activations: float = max(sum(map(mul, counts, held)) for counts in self.moments)
        return self.state_bytes + activations + max(map(layers.passing_bytes, runs))


def _first(low: int, high: int, is_true: Callable[[int], bool]) -> int:
    """The least number from ``low`` on from which it is true, ``high`` where it is not before."""
    return low + bisect_left(range(low, high), True, key=is_true)
