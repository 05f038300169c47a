"""``measured_prices``: what a run of one schedule took, as prices of every other schedule of the same stages.

    an instruction takes    from the end of the one before it on its rank to its own end: what the engine does between counts
    a message               is there when its SEND ends, and latency_s later where its RECV waited; a RECV that did not wait takes own_s
    COUNT, STEP             from when the last rank has come

Each is the mean over all microbatches and steps, so that what jitters on the way of a step counts as it does there; what took more than
three times the median was disturbed and is left out. Where more ranks than cores computed at a time, a computation's seconds are those
that it would have taken alone: ∫ min(1, cores / n(t)) dt over its span, n(t) the number of ranks that compute at t.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from statistics import fmean, median
from typing import Final, TypeVar

from shardstage.errors import ProgramError
from shardstage.program import Collective, Instruction, Program
from shardstage.program.instruction import InstructionKind
from shardstage.simulator.prices import Wire
from shardstage.timeline import Span, Timeline

__all__ = ["MeasuredPrices", "measured_prices"]

DISTURBED: Final = 3.0
_FREE: Final = Wire(0.0, 0.0)
_Key = TypeVar("_Key")
_Found = dict[_Key, list[float]]


@dataclass(frozen=True, kw_only=True)
class MeasuredPrices:
    """Typical times of a run. Collectives cost nothing: they are in what contains them. Nothing hides that was not hidden when measured.

    ``compute`` by (stage, kind, size), ``own`` by (kind, stage, bytes) and for the whole rank by (kind, rank), ``latency_s`` by bytes.
    """

    compute: Mapping[tuple[int, str, int], float]
    own: Mapping[tuple[str, int | None, int], float]
    whole_rank: Mapping[tuple[str, int], float]
    latency_s: Mapping[int, float]
    num_cores: int | None = None
    slowdown: float = 1.0
    special_ranks: tuple[int, ...] = ()
    classes: tuple[range, ...] = ()

    @property
    def overlap_slowdown(self) -> float:
        return self.slowdown - 1.0

    def compute_s(self, rank: int, stage: int, kind: InstructionKind, size: int) -> float:
        """As measured at this size, or in proportion to the nearest one; B is I and W where only they were measured."""
        sizes = [s for (at, what, s) in self.compute if (at, what) == (stage, kind)]
        if sizes:
            nearest = min(sizes, key=lambda s: abs(s - size))
            return self.compute[stage, kind, nearest] * size / nearest
        if kind == "B" and any((at, what) == (stage, "I") for at, what, _ in self.compute):
            return self.compute_s(rank, stage, "I", size) + self.compute_s(rank, stage, "W", size)
        raise ProgramError(
            f"no {kind} of stage {stage} was measured",
            hint="measure a schedule that runs it: zb-h1 runs F, B, I and W",
        )

    def pace(self, rank: int, stage: int, kind: InstructionKind, size: int) -> float:
        return 1.0

    def collective(self, collective: Collective, group: Sequence[int]) -> Wire:
        return _FREE

    def transfer(self, num_bytes: int, source: int, target: int) -> Wire:
        return Wire(_nearest(self.latency_s, num_bytes), 0.0)

    def own_s(self, rank: int, kind: InstructionKind, stage: int | None, num_bytes: int) -> float:
        if stage is None:
            return self.whole_rank.get((kind, rank), 0.0)
        own = {size: s for (what, at, size), s in self.own.items() if (what, at) == (kind, stage)}
        own = own or {size: s for (what, _, size), s in self.own.items() if what == kind}
        return _nearest(own, num_bytes)

    @property
    def levels(self) -> tuple[str, ...]:
        return ()

    def level_of(self, group: Sequence[int]) -> str:
        return ""


def measured_prices(
    timelines: Sequence[Timeline], program: Program, *, num_cores: int | None = None
) -> MeasuredPrices:
    """From measured steps of ``program``, every rank on one clock; ``num_cores`` if the ranks share so many.

    Raises ``ProgramError`` if a timeline does not have all instructions of a rank.
    """
    compute: _Found[tuple[int, str, int]] = defaultdict(list)
    own: _Found[tuple[str, int | None, int]] = defaultdict(list)
    whole: _Found[tuple[str, int]] = defaultdict(list)
    waited: _Found[int] = defaultdict(list)
    steps = [_Step(timeline, program, num_cores) for timeline in timelines]
    for step in steps:
        for key, seconds in step.computations():
            compute[key].append(seconds)
        for kind, rank, seconds in step.whole_rank():
            whole[kind, rank].append(seconds)
        for own_key, seconds in step.own():
            own[own_key].append(seconds)
    own_s = {key: typical_s(found) for key, found in own.items()}
    for step in steps:
        for num_bytes, instruction, seconds in step.waits():
            copied_s = own_s.get((instruction.kind, instruction.stage, num_bytes), 0.0)
            waited[num_bytes].append(max(0.0, seconds - copied_s))
    return MeasuredPrices(
        compute={key: typical_s(found) for key, found in compute.items()},
        own=own_s,
        whole_rank={key: typical_s(found) for key, found in whole.items()},
        latency_s={num_bytes: typical_s(found) for num_bytes, found in waited.items()},
        num_cores=num_cores,
    )


class _Step:
    """One measured step: for each rank its instructions with (end of the one before, own end)."""

    def __init__(self, timeline: Timeline, program: Program, num_cores: int | None) -> None:
        self.program = program
        self.rows: dict[int, list[tuple[Instruction, float, float]]] = {}
        for rank in timeline.ranks:
            self.rows[rank] = list(_timed(timeline, program, rank))
        computing = [(start, end) for row in self.rows.values() for i, start, end in row if i.is_computation]
        self._work = _Work(computing, num_cores)
        self._sent_s: dict[tuple[object, ...], float] = {
            (rank, i.stage, i.peer, i.kind, i.microbatch): end
            for rank, row in self.rows.items()
            for i, _, end in row
            if i.is_send
        }

    def computations(self) -> Iterator[tuple[tuple[int, str, int], float]]:
        for rank, row in self.rows.items():
            sizes = self.program.samples[self.program.mesh.coordinate(rank, "dp")]
            for i, start, end in row:
                if i.is_computation and i.stage is not None and i.microbatch is not None:
                    yield (i.stage, i.kind, sizes[i.microbatch]), self._work.seconds(start, end)

    def own(self) -> Iterator[tuple[tuple[str, int | None, int], float]]:
        """Sends, and receives whose message was there already."""
        for rank, row in self.rows.items():
            for i, start, end in row:
                if i.is_send or (i.is_receive and self._sent(rank, i) <= start):
                    yield (i.kind, i.stage, self._bytes(i)), end - start

    def waits(self) -> Iterator[tuple[int, Instruction, float]]:
        """Receives that waited: from the end of the SEND to the end of the RECV."""
        for rank, row in self.rows.items():
            for i, start, end in row:
                if i.is_receive and self._sent(rank, i) > start:
                    yield self._bytes(i), i, end - self._sent(rank, i)

    def whole_rank(self) -> Iterator[tuple[str, int, float]]:
        """COUNT, REDUCE_GRAD and STEP: from when all ranks have come."""
        found: dict[str, list[tuple[int, float, float]]] = defaultdict(list)
        for rank, row in self.rows.items():
            for i, start, end in row:
                if i.stage is None:
                    found[i.kind].append((rank, start, end))
        for kind, times in found.items():
            # COUNT and REDUCE_GRAD meet over dp or not at all, STEP meets over the world.
            for rank, start, end in times:
                met_s = max(s for other, s, _ in times if kind == "STEP" or self._is_dp_peer(rank, other))
                yield kind, rank, max(0.0, end - max(met_s, start))

    def _is_dp_peer(self, rank: int, other: int) -> bool:
        return other in self.program.mesh.group(rank, "dp")

    def _bytes(self, instruction: Instruction) -> int:
        return sum(tensor.num_bytes for tensor in self.program.tensors(instruction))

    def _sent(self, rank: int, received: Instruction) -> float:
        mesh, peer = self.program.mesh, received.peer
        assert peer is not None
        source = mesh.rank(
            pp=self.program.stage_ranks[peer],
            dp=mesh.coordinate(rank, "dp"),
            tp=mesh.coordinate(rank, "tp"),
        )
        kind = "SEND_F" if received.kind == "RECV_F" else "SEND_B"
        return self._sent_s[source, peer, received.stage, kind, received.microbatch]


class _Work:
    """How much of a core a span got, of ``num_cores`` that the computations of all ranks share."""

    def __init__(self, spans: Iterable[tuple[float, float]], num_cores: int | None) -> None:
        edges = sorted([(start, 1) for start, _ in spans] + [(end, -1) for _, end in spans])
        counts = accumulate(change for _, change in edges)
        self._times = [time_s for time_s, _ in edges]
        rates = [1.0 if num_cores is None else min(1.0, num_cores / max(1, n)) for n in counts]
        pieces = ((b - a) * rate for (a, b), rate in zip(pairwise(self._times), rates, strict=False))
        self._until = [0.0, *accumulate(pieces)]
        self._rates = rates

    def seconds(self, start_s: float, end_s: float) -> float:
        """∫ rate dt; both ends are edges."""
        first, last = bisect_left(self._times, start_s), bisect_right(self._times, end_s) - 1
        return self._until[last] - self._until[first]


def _timed(timeline: Timeline, program: Program, rank: int) -> Iterator[tuple[Instruction, float, float]]:
    spans: dict[str, Span] = {span.name: span for span in timeline.spans_of(rank)}
    before: float | None = None
    for instruction in program.row_of(rank).instructions:
        span = spans.get(instruction.name)
        if span is None:
            raise ProgramError(
                f"rank {rank} was not measured in {instruction.name}",
                hint="measure a step of the program that prices are for",
            )
        yield instruction, span.start_s if before is None else before, span.end_s
        before = span.end_s


def typical_s(seconds: Sequence[float]) -> float:
    """Their mean, those left out that took ``DISTURBED`` times the median or longer."""
    return fmean(s for s in seconds if s <= DISTURBED * median(seconds))


def _nearest(seconds: Mapping[int, float], num_bytes: int) -> float:
    """Of the nearest size that was measured; nothing if none was."""
    if not seconds:
        return 0.0
    return seconds[min(seconds, key=lambda size: abs(size - num_bytes))]
