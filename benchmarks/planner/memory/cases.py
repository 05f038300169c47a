"""A published run as the memory model takes it: shape, kernels, mesh, schedule, accounting → bytes of every pipeline rank."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

from models import Decoder, Kernels, Shape

from shardstage.cluster import load
from shardstage.cost import Folded, Profile, Profiler, StepSetup, fold
from shardstage.cost.accounting import Accounting
from shardstage.cost.memory import MemoryUse, rank_memory, step_bytes
from shardstage.graph.capture import capture
from shardstage.graph.source import ModelSource
from shardstage.graph.tasks import causal_task
from shardstage.layout import Mesh
from shardstage.schedule import Schedule

__all__ = ["Case", "peak_bytes", "state_bytes"]

CAPTURED_LAYERS = 3


@dataclass(frozen=True, kw_only=True)
class Case:
    """``layers_of``: layers of each stage; the embedding goes with the first, the norm, the head and the loss with the last.

    ``num_positions``: rows of the table of learned positions; 0: as many as the sequence has.
    """

    shape: Shape
    kernels: Kernels
    accounting: Accounting
    mesh: Mesh
    layers_of: tuple[int, ...]
    sequence: int
    microbatch: int
    num_microbatches: int
    zero: int
    recompute: str
    schedule: str
    is_sequence_parallel: bool = False
    custom: Schedule | None = None
    num_positions: int = 0
    precision: str = "bfloat16"
    is_compiled: bool = False

    def setup(self) -> StepSetup:
        starts = [0]
        at = 1
        for layers in self.layers_of[:-1]:
            at += layers
            starts.append(at)
        return StepSetup(
            mesh=self.mesh,
            starts=tuple(starts),
            microbatch=self.microbatch,
            num_microbatches=self.num_microbatches,
            global_batch=self.microbatch * self.num_microbatches * self.mesh.dp,
            sequence=self.sequence,
            zero=self.zero,
            recompute=self.recompute,  # type: ignore[arg-type]
            schedule=self.schedule,
            precision=self.precision,
            bucket_bytes=0,
            custom=self.custom,
        )

    def profile(self) -> Profile:
        positions = self.num_positions or self.sequence
        profiler = _profiler(
            *(self.shape, self.kernels, self.mesh.tp, self.sequence, positions),
            is_sequence_parallel=self.is_sequence_parallel,
            is_compiled=self.is_compiled,
        )
        return profiler.at(self.microbatch)

    def ranks(self) -> tuple[MemoryUse, ...]:
        profile, setup = self.profile(), self.setup()
        return tuple(rank_memory(profile, setup, rank, self.accounting) for rank in range(self.mesh.pp))


def peak_bytes(case: Case) -> tuple[int, ...]:
    """Allocated bytes of every pipeline rank at its peak: in a backward, or in the optimizer's step."""
    setup = case.setup()
    return tuple(max(use.total_bytes, step_bytes(use, setup, case.accounting)) for use in case.ranks())


def state_bytes(case: Case) -> tuple[int, ...]:
    """Allocated bytes of every pipeline rank after a step, before the optimizer's own copies of gradients are freed."""
    per_element = 2 * case.setup().master_bytes
    return tuple(
        use.parameters
        + use.master
        + use.gradients
        + use.optimizer
        + use.communication
        + use.fixed
        + round(use.optimizer / per_element * case.accounting.update_bytes)
        for use in case.ranks()
    )


@cache
def _profiler(
    shape: Shape,
    kernels: Kernels,
    tp: int,
    sequence: int,
    num_positions: int,
    *,
    is_sequence_parallel: bool,
    is_compiled: bool,
) -> Profiler:
    """Bytes do not depend on the device: any will do."""
    few = replace(shape, layers=min(CAPTURED_LAYERS, shape.layers))
    folded = _unfolded(_captured(few, kernels, sequence, num_positions), shape.layers)
    return Profiler(
        folded,
        load(f"a100-80:{tp}"),
        tp=tp,
        sequence=sequence,
        is_sequence_parallel=is_sequence_parallel,
        is_compiled=is_compiled,
    )


@cache
def _captured(shape: Shape, kernels: Kernels, sequence: int, num_positions: int) -> Folded:
    source = ModelSource(
        name="decoder",
        factory=lambda: Decoder(shape, kernels, num_positions),
        task=causal_task(shape.vocab),
        vocab_size=shape.vocab,
    )
    return fold(capture(source, sequence=sequence, dtype="bfloat16"))


def _unfolded(folded: Folded, num_layers: int) -> Folded:
    """The same model with more layers: the last layer's unit is repeated."""
    last = max(index for index, unit in enumerate(folded.units) if unit.module)
    present = sum(bool(unit.module) for unit in folded.units)
    more = (folded.units[last],) * (num_layers - present)
    return replace(folded, units=(*folded.units[: last + 1], *more, *folded.units[last + 1 :]))
