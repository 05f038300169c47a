"""``Recorder``: a measured Timeline of one rank's step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple, Protocol

import torch

from shardstage.program import Instruction
from shardstage.timeline import MemorySample, Span, Stream

__all__ = ["Observer", "Recorder"]


Reading = float | torch.cuda.Event
"""Of a clock, in seconds; or an event on a CUDA stream."""


class Observer(Protocol):
    """Who is told what an engine does: ``begin`` at the beginning of a step, ``span`` around each instruction."""

    def begin(self) -> None: ...
    def span(self, instruction: Instruction) -> AbstractContextManager[None]: ...


class _Moment(NamedTuple):
    """An instruction between two readings."""

    instruction: Instruction
    start: Reading
    end: Reading
    held_bytes: int


class Recorder:
    """Takes the time before and after each instruction of a step, and the memory after it.

    ``held_bytes`` says how much memory the rank holds now. Times are of this rank's clock; ``origin_s`` is the clock's reading at the
    beginning of the step, so that ranks of a host can be put on one axis. On a 2-core machine a span takes about 4 µs, and 20 µs where
    memory is read, too: 0.1 and 0.7 % of a step of 100 ms with 30 instructions.
    """

    def __init__(self, rank: int, device: torch.device, held_bytes: Callable[[], int] | None = None) -> None:
        self._rank = rank
        self._is_cuda = device.type == "cuda"
        self._held_bytes = held_bytes
        self._moments: list[_Moment] = []
        self._begun: torch.cuda.Event | None = None
        self.origin_s = 0.0

    def begin(self) -> None:
        """Forgets the step before."""
        self._moments.clear()
        self.origin_s = time.perf_counter()
        if self._is_cuda:
            self._begun = self._event()

    @contextmanager
    def span(self, instruction: Instruction) -> Iterator[None]:
        """Records what runs inside as ``instruction``."""
        start = self._now()
        yield
        end = self._now()
        held = self._held_bytes() if self._held_bytes is not None else 0
        self._moments.append(_Moment(instruction, start, end, held))

    def spans(self, origin_s: float | None = None) -> tuple[Span, ...]:
        """The spans of the last step, in seconds since ``origin_s`` (this rank's own beginning where it is not given)."""
        offset = 0.0 if origin_s is None else self.origin_s - origin_s
        return tuple(
            Span(self._rank, _stream_of(m.instruction), m.instruction.name, *self._times(m, offset))
            for m in self._moments
        )

    def memory(self, origin_s: float | None = None) -> tuple[MemorySample, ...]:
        """What was held after each instruction of the last step; empty where nobody said how much that is."""
        if self._held_bytes is None:
            return ()
        offset = 0.0 if origin_s is None else self.origin_s - origin_s
        return tuple(
            MemorySample(
                self._rank, self._times(m, offset)[1], {"allocated": m.held_bytes}, m.instruction.name
            )
            for m in self._moments
        )

    def _now(self) -> Reading:
        return self._event() if self._is_cuda else time.perf_counter()

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's is untyped
        event.record()
        return event

    def _times(self, moment: _Moment, offset: float) -> tuple[float, float]:
        return self._since_begin_s(moment.start) + offset, self._since_begin_s(moment.end) + offset

    def _since_begin_s(self, reading: Reading) -> float:
        if isinstance(reading, float):
            return reading - self.origin_s
        assert self._begun is not None
        reading.synchronize()
        return float(self._begun.elapsed_time(reading)) / 1e3


def _stream_of(instruction: Instruction) -> Stream:
    if instruction.is_send or instruction.is_receive:
        return "pp"
    return "dp" if instruction.kind in ("COUNT", "UNSHARD", "RESHARD", "REDUCE_GRAD") else "compute"
