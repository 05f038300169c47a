"""``compare_timelines``: what was predicted against what was measured, by kind of act and stage, and by rank."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from shardstage.timeline.timeline import Span, Stream, Timeline

__all__ = ["ActTimes", "Comparison", "RankUse", "compare_timelines", "kind_of", "rank_use"]

_NAME = re.compile(r"(?P<stage>\d+)?(?P<kind>[A-Z][A-Z_]*)(?P<microbatch>\d+)?")
COMPUTE_KINDS = frozenset({"F", "B", "I", "W"})


class Kind(NamedTuple):
    """What an act is, without its microbatch: ``stage`` is ``None`` for one that is for the whole rank."""

    kind: str
    stage: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ActTimes:
    """Median seconds of one kind of act on one stage; ``None`` where only the other timeline has it."""

    kind: str
    stage: int | None
    predicted_s: float | None
    measured_s: float | None

    @property
    def error_ratio(self) -> float | None:
        """Predicted over measured, less one."""
        if self.predicted_s is None or not self.measured_s:
            return None
        return self.predicted_s / self.measured_s - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class RankUse:
    """A rank's step: seconds in F, B, I and W, seconds in STEP, seconds of talk that its compute does not cover, seconds of neither.

    ``peak_bytes`` is ``None`` where memory was not recorded.
    """

    rank: int
    compute_s: float
    update_s: float
    exposed_s: float
    idle_s: float
    peak_bytes: int | None

    @property
    def step_s(self) -> float:
        return self.compute_s + self.update_s + self.exposed_s + self.idle_s

    @property
    def bubble_ratio(self) -> float:
        """Share of the step in which the rank does nothing, or waits."""
        return (self.idle_s + self.exposed_s) / self.step_s if self.step_s else 0.0


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two timelines of one program side by side."""

    predicted_s: float
    measured_s: float
    acts: tuple[ActTimes, ...]
    ranks: tuple[tuple[RankUse, RankUse], ...]

    @property
    def error_ratio(self) -> float:
        """Predicted over measured step time, less one."""
        return self.predicted_s / self.measured_s - 1 if self.measured_s else 0.0


def compare_timelines(predicted: Timeline, measured: Timeline) -> Comparison:
    """Acts in the order in which they first appear; of each measured rank its use and that of the rank that stands for it."""
    theirs, ours = _medians(predicted.spans), _medians(measured.spans)
    stands_for = {rank: first for first, ranks in predicted.alike.items() for rank in ranks}
    return Comparison(
        predicted_s=predicted.step_time_s,
        measured_s=measured.step_time_s,
        acts=tuple(
            ActTimes(kind=k.kind, stage=k.stage, predicted_s=theirs.get(k), measured_s=ours.get(k))
            for k in dict.fromkeys((*theirs, *ours))
        ),
        ranks=tuple(
            (rank_use(predicted, stands_for.get(rank, rank)), rank_use(measured, rank))
            for rank in measured.ranks
        ),
    )


def kind_of(name: str) -> Kind:
    """``0F3`` → F of stage 0; a name that is no instruction is a kind of its own."""
    match = _NAME.match(name)
    if match is None:
        return Kind(name, None)
    stage = match["stage"]
    return Kind(match["kind"], None if stage is None else int(stage))


def rank_use(timeline: Timeline, rank: int) -> RankUse:
    """How one rank spends the step: what it computes, what it waits for in talk, and the rest."""
    computing, updating, talking = [], [], []
    for span in timeline.spans_of(rank):
        kind = kind_of(span.name).kind
        if kind == "STEP" and span.stream == "compute":
            updating.append(span)
        elif span.stream == "compute" and kind in COMPUTE_KINDS:
            computing.append(span)
        elif span.stream in ("tp", "dp", "pp"):
            talking.append(span)
    compute_s, update_s = _covered_s(computing), _covered_s(updating)
    busy_s = _covered_s([*computing, *updating])
    together_s = _covered_s([*computing, *updating, *talking])
    peak = timeline.peak(rank)
    return RankUse(
        rank=rank,
        compute_s=compute_s,
        update_s=update_s,
        exposed_s=together_s - busy_s,
        idle_s=max(0.0, timeline.step_time_s - together_s),
        peak_bytes=None if peak is None else peak.total_bytes,
    )


def _covered_s(spans: Iterable[Span]) -> float:
    """Seconds in which at least one of the spans runs."""
    covered = end = 0.0
    for span in sorted(spans, key=lambda s: s.start_s):
        covered += max(0.0, span.end_s - max(span.start_s, end))
        end = max(end, span.end_s)
    return covered


def _medians(spans: Iterable[Span]) -> Mapping[Kind, float]:
    found: dict[Kind, list[float]] = defaultdict(list)
    for kind, seconds in _by_kind(spans):
        found[kind].append(seconds)
    return {kind: median(seconds) for kind, seconds in found.items()}


def _by_kind(spans: Iterable[Span]) -> Iterator[tuple[Kind, float]]:
    counted: frozenset[Stream] = frozenset({"compute"})
    for span in spans:
        if span.stream in counted:
            yield kind_of(span.name), span.duration_s
