"""The allocations of one pipeline rank in order, for torch's caching allocator: where large tensors of several sizes take turns, what is
reserved is more than the sum of what lives.

    start                 parameters, the rank's part of master weights, buffers that receive
    F of a microbatch     what each unit's forward allocates and frees (``recorder``); what it keeps stays
    B of a microbatch     unit by unit, the last one first: what is computed again, gradients, sums of the weights' gradients
    step                  gradients in buckets, flattened and in float32; the rank's part in float32; both moments, the first time
    F, B                  of the next step, beside the moments
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from aleph_alpha import Embedding, Head, Layer, LocalShape, recomputed
from recorder import Event, Passage, record
from torch import Tensor, nn

from shardstage.simulator.allocator import Allocation

__all__ = ["RankOfStage", "steps"]

STEADY_MICROBATCHES = 2
"""Run after the pipeline is full: enough for the pattern to repeat."""

CUBLAS_WORKSPACE_BYTES = 8_519_680
"""torch's, of a stream (getChosenWorkspaceSize in CUDABlas.cpp: 4096:2:16:8 KiB)."""

BUCKET_ELEMENTS = 500_000_000
"""Gradients of so many elements, and the parameter that exceeds them, are reduced at once (optimizer_config.py, allreduce.py)."""

LOGITS_BUFFERS = 2
"""Outputs of the last stage that live on in the pipeline's buffers, overwritten in turn (required_buffer_count in train.py)."""


@dataclass(frozen=True, kw_only=True)
class RankOfStage:
    """A rank of a stage of ``num_layers``, of a pipeline of ``pp`` ranks and ``dp`` of them beside each other."""

    shape: LocalShape
    num_layers: int
    rank: int
    pp: int
    dp: int
    microbatch: int
    sequence: int
    num_microbatches: int
    is_recomputed: bool

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        return self.rank == self.pp - 1


def steps(stage: RankOfStage) -> tuple[list[Allocation], list[Allocation]]:
    """The first step of a rank and the next, each with as many microbatches as show what is held."""
    tape = _Tape(stage)
    return [*tape.state(), *tape.step(is_first=True)], list(tape.step(is_first=False))


class _Tape:
    """What is alive between units has names of its own: what unit i gets and the gradient of that, microbatch by microbatch."""

    def __init__(self, stage: RankOfStage) -> None:
        self.stage = stage
        self.units, self.elements = _units(stage)
        self.part = -(-self.elements // stage.dp)
        self.held = min(stage.pp - stage.rank, stage.num_microbatches)
        self.logits: list[str] = []
        self.sums: dict[str, int] = {}
        self.backs: dict[int, str] = {}

    def state(self) -> Iterator[Allocation]:
        yield Allocation("workspace", CUBLAS_WORKSPACE_BYTES)
        yield Allocation("parameters", 2 * self.elements)
        yield Allocation("master", 4 * self.part)
        if not self.stage.is_first:
            yield Allocation("received input", _bytes_of(self.units[0], self.units[0].entered))
        if not self.stage.is_last:
            yield Allocation("received gradient", _bytes_of(self.units[-1], self.units[-1].left))

    def step(self, *, is_first: bool) -> Iterator[Allocation]:
        yield from self._microbatches()
        yield from self._optimizer(is_first=is_first)

    def _microbatches(self) -> Iterator[Allocation]:
        """1F1B."""
        total = min(self.stage.num_microbatches, self.held + STEADY_MICROBATCHES)
        started = 0
        for microbatch in range(total):
            while started < min(total, microbatch + self.held):
                yield from self._forward(started)
                started += 1
            yield from self._backward(microbatch)
        yield from (Allocation(name, 0) for name in self.logits)
        self.logits.clear()

    def _forward(self, microbatch: int) -> Iterator[Allocation]:
        yield Allocation(f"in {microbatch} 0", _bytes_of(self.units[0], self.units[0].entered))
        for place, unit in enumerate(self.units):
            yield from self._events(unit.forward, place, microbatch)
        last = len(self.units) - 1
        for number in self.units[last].kept_elsewhere:
            self.logits.append(f"{microbatch} {last} {number}")
            if len(self.logits) > LOGITS_BUFFERS:
                yield Allocation(self.logits.pop(0), 0)

    def _backward(self, microbatch: int) -> Iterator[Allocation]:
        """A stage's result and the gradient that came back live until its end (_execute_backward_pass); so does what it got."""
        last = len(self.units) - 1
        self.backs = {last + 1: f"back {microbatch} {last + 1}"}
        is_first = not self.sums
        for place in range(last, -1, -1):
            unit = self.units[place]
            if unit.handed_on:
                is_passed = unit.handed_on == unit.gradient
                self.backs[place] = self.backs[place + 1] if is_passed else f"back {microbatch} {place}"
            yield from self._events(unit.first_backward if is_first else unit.backward, place, microbatch)
        ends = {self.backs[last + 1], self.backs.get(0, self.backs[last + 1])}
        yield from (
            Allocation(name, 0) for name in (*ends, f"in {microbatch} 0", f"in {microbatch} {last + 1}")
        )

    def _events(self, events: Sequence[Event], place: int, microbatch: int) -> Iterator[Allocation]:
        unit, is_last = self.units[place], place == len(self.units) - 1
        freed = {event.number for event in events if not event.num_bytes}
        for number, num_bytes in events:
            if number == unit.entered:
                if place and not num_bytes:
                    yield Allocation(f"in {microbatch} {place}", 0)
            elif number == unit.left:
                if num_bytes:
                    yield Allocation(f"in {microbatch} {place + 1}", num_bytes)
            elif number == unit.gradient:
                if is_last == bool(num_bytes) and unit.gradient != unit.handed_on:
                    yield Allocation(self.backs[place + 1], num_bytes)
            elif number == unit.handed_on:
                if num_bytes:
                    yield Allocation(self.backs[place], num_bytes)
            elif events is unit.first_backward and num_bytes and number not in freed:
                self.sums[f"sum {place} {number}"] = num_bytes
                yield Allocation(f"sum {place} {number}", num_bytes)
            else:
                yield Allocation(f"{microbatch} {place} {number}", num_bytes)

    def _optimizer(self, *, is_first: bool) -> Iterator[Allocation]:
        """optimizer.py and parameter_group.py: sums are reduced bucket by bucket; of what is not the rank's own they go first."""
        for elements in _buckets([num_bytes // 2 for _, num_bytes in sorted(self.sums.items())]):
            yield from _passing(("flat", 2 * elements), ("wide", 4 * elements))
        *others, own = self.sums
        yield from (Allocation(name, 0) for name in others)
        yield Allocation("part of gradient", 4 * self.part)
        yield Allocation(own, 0)
        self.sums.clear()
        if is_first:
            yield Allocation("first moment", 4 * self.part)
            yield Allocation("second moment", 4 * self.part)
        yield from _passing(("root of second moment", 4 * self.part))
        yield Allocation("part of gradient", 0)
        yield from _passing(("gathered", 2 * self.elements // max(1, self.elements // BUCKET_ELEMENTS)))


def _passing(*tensors: tuple[str, int]) -> Iterator[Allocation]:
    yield from (Allocation(name, num_bytes) for name, num_bytes in tensors)
    yield from (Allocation(name, 0) for name, _ in tensors)


def _buckets(sizes: Sequence[int]) -> Iterator[int]:
    elements = 0
    for size in sizes:
        elements += size
        if elements > BUCKET_ELEMENTS:
            yield elements
            elements = 0
    if elements:
        yield elements


def _bytes_of(unit: Passage, number: int) -> int:
    return next(
        event.num_bytes for event in unit.forward if event == (number, event.num_bytes) and event.num_bytes
    )


def _units(stage: RankOfStage) -> tuple[list[Passage], int]:
    """What passes through a stage, and how many parameter elements it has."""
    shape, sizes = stage.shape, (stage.microbatch, stage.sequence)
    layer, elements = _layer(shape, *sizes, stage.is_recomputed)
    units, total = [layer] * stage.num_layers, elements * stage.num_layers
    for is_there, end in ((stage.is_first, _embedding), (stage.is_last, _head)):
        if is_there:
            unit, more = end(shape, *sizes, stage.is_recomputed)
            units = [unit, *units] if end is _embedding else [*units, unit]
            total += more
    return units, total


@cache
def _layer(shape: LocalShape, microbatch: int, sequence: int, is_recomputed: bool) -> tuple[Passage, int]:
    layer = Layer(shape)
    run = recomputed(layer) if is_recomputed else layer
    return _recorded(layer, run, _hidden(shape, microbatch, sequence))


@cache
def _head(shape: LocalShape, microbatch: int, sequence: int, is_recomputed: bool) -> tuple[Passage, int]:
    head = Head(shape, is_recomputed=is_recomputed)
    return _recorded(head, head, _hidden(shape, microbatch, sequence), end=head.communicated.clear)


@cache
def _embedding(
    shape: LocalShape, microbatch: int, sequence: int, _is_recomputed: bool
) -> tuple[Passage, int]:
    embedding = Embedding(shape)
    tokens = torch.empty((microbatch, sequence), dtype=torch.int64, device="meta")
    return _recorded(embedding, embedding, tokens)


def _hidden(shape: LocalShape, microbatch: int, sequence: int) -> Tensor:
    positions = sequence // shape.tp if shape.is_sequence_parallel else sequence
    sizes = (microbatch, positions, shape.hidden)
    return torch.empty(sizes, dtype=torch.bfloat16, device="meta", requires_grad=True)


def _recorded(
    module: nn.Module,
    run: Callable[[Tensor], Tensor],
    given: Tensor,
    end: Callable[[], object] = lambda: None,
) -> tuple[Passage, int]:
    parameters = list(module.parameters())
    return record(run, given, parameters, end), sum(parameter.numel() for parameter in parameters)
