"""``Program``: the ordered acts of every rank, as plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from shardstage.cluster import CollectiveKind
from shardstage.graph.cuts import Edge
from shardstage.layout import Mesh
from shardstage.program.instruction import Instruction
from shardstage.units import dtype_bytes

__all__ = ["Collective", "ParameterUse", "Program", "Row", "TensorType"]


@dataclass(frozen=True, slots=True)
class TensorType:
    """A tensor that travels: the graph's value, its dtype and local shape. As text ``add_7:float32[4,16,64]``."""

    value: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * dtype_bytes(self.dtype)


@dataclass(frozen=True, slots=True)
class Collective:
    """One collective of one rank. As text ``tp.all_reduce:float32[4096]`` or ``dp.reduce_scatter:float32[512]{b0}``.

    ``axis``: ``tp``, ``dp``, ``world``, or ``tie0+3``: the ranks at pp 0 and 3 and the same dp and tp coordinates.
    ``numel`` elements are those of the whole tensor: what is reduced, what all_gather returns, what reduce_scatter is given.
    ``bucket`` names the parameters whose gradients (or values) it carries, in the Program's table.
    """

    axis: str
    kind: CollectiveKind
    dtype: str
    numel: int
    bucket: str = ""

    @property
    def num_bytes(self) -> int:
        return self.numel * dtype_bytes(self.dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterUse:
    """A parameter, the stages that use it, and the axes over which its gradient must be summed (none: it is frozen, or alone).

    ``dp``; ``tp`` where it lies whole on tensor-parallel ranks that see different parts of its gradient; ``tie…`` where pipeline
    ranks share it.
    """

    fqn: str
    stages: tuple[int, ...]
    summed_over: tuple[str, ...]
    is_trained: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What the ranks at (pp, each of dp, each of tp) do: they act alike, down to shapes."""

    pp: int
    dp: tuple[int, ...]
    tp: tuple[int, ...]
    instructions: tuple[Instruction, ...]


@dataclass(frozen=True, kw_only=True)
class Program:
    """Everything that runs in a step, of all ranks; it round-trips through ``format_program`` and ``parse_program``.

    ``stage_ranks[s]`` is the pp coordinate that runs stage s. ``samples[d]`` are the sizes of dp rank d's microbatches.
    ``edges`` are the values that cross between stages, also between two of one rank, which need no message.
    ``messages``, ``calls`` and ``buckets`` are the tables that instructions and collectives refer to.
    Every rank of the mesh is in exactly one of ``rows``.
    """

    mesh: Mesh
    schedule: str
    global_batch: int
    samples: tuple[tuple[int, ...], ...]
    stage_ranks: tuple[int, ...]
    edges: tuple[Edge, ...]
    messages: Mapping[str, tuple[TensorType, ...]]
    calls: Mapping[str, tuple[Collective, ...]]
    buckets: Mapping[str, tuple[str, ...]]
    parameters: tuple[ParameterUse, ...]
    rows: tuple[Row, ...]

    @property
    def num_stages(self) -> int:
        return len(self.stage_ranks)

    @property
    def num_microbatches(self) -> int:
        return len(self.samples[0])

    def row_of(self, rank: int) -> Row:
        """The row of a rank of the world."""
        return self._rows_by_rank[rank]

    def stages_of(self, pp: int) -> tuple[int, ...]:
        """The stages that a pipeline rank runs, in order."""
        return tuple(stage for stage, holder in enumerate(self.stage_ranks) if holder == pp)

    def collectives(self, instruction: Instruction) -> tuple[Collective, ...]:
        """What an instruction runs, in order."""
        return self.calls[instruction.calls] if instruction.calls else ()

    def tensors(self, instruction: Instruction) -> tuple[TensorType, ...]:
        """What a SEND or RECV moves, in order."""
        return self.messages[instruction.message] if instruction.message else ()

    def edges_between(self, source: int, target: int) -> tuple[Edge, ...]:
        return tuple(edge for edge in self.edges if (edge.source, edge.target) == (source, target))

    @cached_property
    def _rows_by_rank(self) -> dict[int, Row]:
        return {
            self.mesh.rank(pp=row.pp, dp=dp, tp=tp): row
            for row in self.rows
            for dp in row.dp
            for tp in row.tp
        }
