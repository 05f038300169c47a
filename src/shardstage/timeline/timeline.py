"""``Timeline``: spans of time by rank and stream, and memory over time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

__all__ = ["STREAMS", "MemorySample", "Span", "Stream", "Timeline"]

Stream = Literal["compute", "tp", "dp", "pp", "copy"]
STREAMS: tuple[Stream, ...] = ("compute", "tp", "dp", "pp", "copy")
"""What a rank can do at the same time: compute, talk along each mesh axis, copy to and from the host."""


@dataclass(frozen=True, slots=True)
class Span:
    """One thing that a rank did: ``name`` is the instruction as a Program writes it (``0F3``, ``0SEND_F3>1``) or a collective of it.

    Seconds count from the beginning of the step. Spans of one rank and stream do not overlap.
    """

    rank: int
    stream: Stream
    name: str
    start_s: float
    end_s: float

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s


@dataclass(frozen=True, slots=True)
class MemorySample:
    """What a rank holds from ``time_s`` on, until its next sample: bytes by category (``parameters``, ``gradients``, ``optimizer``,
    ``activations`` …, the categories of ``shardstage.cost.MemoryUse``; a measured one may know ``allocated`` only)."""

    rank: int
    time_s: float
    bytes_by_category: Mapping[str, int]
    cause: str = ""

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes_by_category.values())


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """One step. Where ranks are alike only one of them has spans: ``alike`` maps it to all that it stands for, itself included.

    ``spans`` are in order of (rank, stream, start), ``memory`` in order of (rank, time). ``labels`` name a rank: ``pp=0 dp=0 tp=0``.
    """

    source: Literal["predicted", "measured"]
    spans: tuple[Span, ...]
    memory: tuple[MemorySample, ...] = ()
    alike: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    labels: Mapping[int, str] = field(default_factory=dict)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks with spans, in order."""
        return tuple(sorted(self._spans_by_rank))

    @cached_property
    def step_time_s(self) -> float:
        return max((span.end_s for span in self.spans), default=0.0)

    def spans_of(self, rank: int, stream: Stream | None = None) -> tuple[Span, ...]:
        """The spans of a rank, of all its streams or of one, in order of time within each."""
        held = self._spans_by_rank.get(rank, ())
        return held if stream is None else tuple(span for span in held if span.stream == stream)

    def busy_s(self, rank: int, stream: Stream = "compute") -> float:
        return sum(span.duration_s for span in self.spans_of(rank, stream))

    def peak(self, rank: int) -> MemorySample | None:
        """The first moment at which a rank holds most; ``None`` where memory was not recorded."""
        return max(
            self._memory_by_rank.get(rank, ()),
            key=lambda sample: sample.total_bytes,
            default=None,
        )

    # Asked for each of thousands of ranks, so sorted out once: a search through all spans for each rank would be quadratic.
    @cached_property
    def _spans_by_rank(self) -> Mapping[int, tuple[Span, ...]]:
        found: dict[int, list[Span]] = {}
        for span in self.spans:
            found.setdefault(span.rank, []).append(span)
        return {rank: tuple(spans) for rank, spans in found.items()}

    @cached_property
    def _memory_by_rank(self) -> Mapping[int, tuple[MemorySample, ...]]:
        found: dict[int, list[MemorySample]] = {}
        for sample in self.memory:
            found.setdefault(sample.rank, []).append(sample)
        return {rank: tuple(samples) for rank, samples in found.items()}
