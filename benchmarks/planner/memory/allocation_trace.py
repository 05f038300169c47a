"""The allocations of one pipeline rank in order, for torch's caching allocator: where large tensors of several sizes take turns, what is
reserved is more than the sum of what lives.

    start                    parameters, master weights, moments
    F of a microbatch        of every unit the tensors that it keeps; of the loss the logits, their copy in fp32, the log-softmax
    B of a microbatch        unit by unit: what is computed again, the working set, a gradient of the unit's weights; then they go
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cases import Case

from shardstage.cost import Profile, UnitCost
from shardstage.simulator.allocator import Allocation

__all__ = ["Logits", "allocations"]

LAYER_TENSORS = 8
"""Kept by a decoder layer: four each of attention, its projections, the norms and the MLP; how many matters little."""

STEADY_MICROBATCHES = 4
"""Run after the pipeline is full: enough for the pattern to repeat."""


@dataclass(frozen=True, kw_only=True)
class Logits:
    """``num_logits`` of a rank; ``num_buffers`` outputs of the last stage live on in the pipeline's buffers, overwritten in turn.

    ``is_gathered``: parts of the vocabulary are gathered in a list and then concatenated. torch gathers into a flat buffer of its own
    first; the communication's stream keeps it and the parts until the work queued before its end is done (ProcessGroupNCCL, record_stream).
    """

    num_logits: int
    num_buffers: int
    is_gathered: bool


def allocations(case: Case, rank: int, logits: Logits) -> Iterator[Allocation]:
    """One step of a rank of a 1F1B pipeline with a stage on each rank."""
    setup, profile = case.setup(), case.profile()
    units = [profile.units[index] for index in setup.units_of(rank, profile)]
    use = case.ranks()[rank]
    yield Allocation("parameters", use.parameters)
    yield Allocation("master", use.master)
    yield Allocation("first moment", use.optimizer // 2)
    yield Allocation("second moment", use.optimizer // 2)
    if use.fixed:
        yield Allocation("fixed", use.fixed)
    held = setup.in_flight(rank)
    total = min(case.num_microbatches, held + STEADY_MICROBATCHES)
    stage = _Stage(case, units, profile, rank == case.mesh.pp - 1, logits)
    for microbatch in range(min(held - 1, total)):
        yield from stage.forward(microbatch)
    for backward in range(total):
        if backward + held - 1 < total:
            yield from stage.forward(backward + held - 1)
        yield from stage.backward(backward)


class _Stage:
    def __init__(
        self, case: Case, units: list[UnitCost], profile: Profile, has_loss: bool, logits: Logits
    ) -> None:
        self.units, self.has_loss, self.logits = units, has_loss, logits
        self.recompute = case.recompute
        setup = case.setup()
        self.gradient_bytes = case.accounting.gradient_bytes or setup.master_bytes
        shared = [sum(profile.shared_elements[name] for name in unit.shared) for unit in units]
        self.elements = [unit.own_elements + more for unit, more in zip(units, shared, strict=True)]
        self.shown: set[int] = set()
        self.bodies = len(units) - 1 if has_loss else len(units)

    def forward(self, microbatch: int) -> Iterator[Allocation]:
        for number in range(self.bodies):
            unit = self.units[number]
            working = unit.transient_bytes // 2
            if working:
                yield Allocation(f"F working {microbatch}", working)
            yield from self._kept(microbatch, number)
            if working:
                yield Allocation(f"F working {microbatch}", 0)
        if self.has_loss:
            yield from self._loss_forward(microbatch)

    def backward(self, microbatch: int) -> Iterator[Allocation]:
        if self.has_loss:
            yield from self._loss_backward(microbatch)
            yield from self._gradient(self.bodies, microbatch)
        for number in reversed(range(self.bodies)):
            unit = self.units[number]
            extra = unit.kept[self.recompute].extra_bytes  # type: ignore[index]
            again = [f"again {microbatch} {number} {i}" for i in range(LAYER_TENSORS if extra else 0)]
            yield from (Allocation(name, extra // LAYER_TENSORS) for name in again)
            working = [
                f"B working {microbatch} {number} {i}" for i in range(2 if unit.transient_bytes else 0)
            ]
            yield from (Allocation(name, unit.transient_bytes // 2) for name in working)
            yield from self._gradient(number, microbatch)
            yield from (Allocation(name, 0) for name in (*working, *again))
            yield from (Allocation(a.name, 0) for a in self._kept(microbatch, number))

    def _kept(self, microbatch: int, number: int) -> Iterator[Allocation]:
        num_bytes = self.units[number].kept[self.recompute].saved_bytes  # type: ignore[index]
        tensors = LAYER_TENSORS if self.recompute == "none" else 1
        if num_bytes >= tensors:
            yield from (
                Allocation(f"kept {microbatch} {number} {i}", num_bytes // tensors) for i in range(tensors)
            )

    def _loss_forward(self, microbatch: int) -> Iterator[Allocation]:
        n, buffers = self.logits.num_logits, self.logits.num_buffers
        if self.logits.is_gathered:
            yield Allocation("parts", 2 * n)
            yield Allocation("flat", 2 * n)
        yield Allocation(f"logits {microbatch}", 2 * n)
        if microbatch >= buffers:
            yield Allocation(f"logits {microbatch - buffers}", 0)
        yield Allocation("wide", 4 * n)
        yield Allocation(f"log-softmax {microbatch}", 4 * n)
        yield Allocation("wide", 0)
        if self.logits.is_gathered:
            yield Allocation("parts", 0)
            yield Allocation("flat", 0)

    def _loss_backward(self, microbatch: int) -> Iterator[Allocation]:
        n = self.logits.num_logits
        yield Allocation("d log-softmax", 4 * n)
        yield Allocation("d wide", 4 * n)
        yield Allocation("d log-softmax", 0)
        yield Allocation(f"log-softmax {microbatch}", 0)
        yield Allocation("d logits", 2 * n)
        yield Allocation("d wide", 0)
        yield Allocation("d hidden", self.units[-1].input_bytes)
        yield Allocation("d hidden", 0)
        yield Allocation("d logits", 0)

    def _gradient(self, number: int, microbatch: int) -> Iterator[Allocation]:
        """The first of a step stays as the sum; later ones are added to it."""
        num_bytes = self.elements[number] * self.gradient_bytes
        if not num_bytes:
            return
        name = f"gradient {number}"
        if number not in self.shown:
            self.shown.add(number)
            yield Allocation(name, num_bytes)
            return
        yield Allocation(f"{name} of {microbatch}", num_bytes)
        yield Allocation(f"{name} of {microbatch}", 0)
