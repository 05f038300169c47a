"""``Program``: the ordered acts of every rank, and the computation that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from shardstage.graph import ModelGraph
from shardstage.graph.cuts import Edge, Segment, cut
from shardstage.layout import Mesh
from shardstage.plan.plan import Plan, StageRange
from shardstage.program.instruction import Instruction
from shardstage.sharding import Sharding, localize

__all__ = ["Program", "stage_starts"]


@dataclass(frozen=True, kw_only=True)
class Program:
    """Everything that runs in a step.

    ``instructions[s]`` are those of all ranks of stage s: ranks that differ only in dp and tp act alike. ``edges`` are the values that
    travel between stages, in graph order. ``sharding_at`` gives the sharded graph for a microbatch of that many samples: the
    same decisions at another size.
    """

    plan: Plan
    instructions: tuple[tuple[Instruction, ...], ...]
    edges: tuple[Edge, ...]
    sharding_at: Callable[[int], Sharding]

    @property
    def mesh(self) -> Mesh:
        return self.plan.mesh

    def segments(self, *, tp: int, microbatch: int) -> tuple[Segment, ...]:
        """The stages' local graphs for tensor-parallel rank ``tp`` and a microbatch of that many samples."""
        local = localize(self.sharding_at(microbatch), tp)
        return cut(local, stage_starts(local, self.plan.stages))

    def edges_between(self, source: int, target: int) -> tuple[Edge, ...]:
        return tuple(edge for edge in self.edges if (edge.source, edge.target) == (source, target))

    def __str__(self) -> str:
        return "\n".join(" ".join(map(str, row)) for row in self.instructions)


def stage_starts(graph: ModelGraph, stages: tuple[StageRange, ...]) -> tuple[int, ...]:
    """Index of the first op of each stage; an op that sharding put before another (``other@kind``) goes with that one."""
    first_index: dict[str, int] = {}
    for index, op in enumerate(graph.ops):
        first_index.setdefault(op.name.split("@")[0], index)
    return (0, *(first_index[stage.first] for stage in stages[1:]))
