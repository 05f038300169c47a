"""``StageGraphs``: the computation that a Program's instructions stand for: each stage's local graph."""

from __future__ import annotations

from functools import cached_property

from shardstage.errors import PlanError
from shardstage.graph import ModelGraph
from shardstage.graph.cuts import Segment, cut
from shardstage.layout import Shard
from shardstage.plan.plan import Plan, StageRange
from shardstage.sharding import Sharding, localize, shard

__all__ = ["StageGraphs"]


class StageGraphs:
    """The graph as a plan shards and cuts it, at every size of microbatch; what was made once is kept.

    ``graph`` is scalable (captured at marker sizes) or was captured at the plan's microbatch and sequence. Raises ``PlanError`` for a
    stage that begins at an op that the graph does not have.
    """

    def __init__(self, graph: ModelGraph, plan: Plan) -> None:
        self.graph = graph
        self.plan = plan
        self._shardings: dict[int, Sharding] = {}
        self._segments: dict[tuple[int, int], tuple[Segment, ...]] = {}
        _require_ops(graph, plan)

    def sharding_at(self, microbatch: int) -> Sharding:
        """The sharded graph for a microbatch of that many samples: the same decisions at another size."""
        if microbatch not in self._shardings:
            self._shardings[microbatch] = shard(
                _sized(self.graph, microbatch, self.plan.sequence),
                num_ranks=self.plan.mesh.tp,
                is_sequence_parallel=self.plan.is_sequence_parallel,
                replicate=self.plan.replicate,
            )
        return self._shardings[microbatch]

    def segments(self, *, tp: int, microbatch: int) -> tuple[Segment, ...]:
        """The stages' local graphs for tensor-parallel rank ``tp`` and a microbatch of that many samples."""
        key = (self.twin(tp), microbatch)
        if tp != key[0] or key not in self._segments:
            local = localize(self.sharding_at(microbatch), tp)
            made = cut(local, _stage_starts(local, self.plan.stages))
            if tp != key[0]:
                return made
            self._segments[key] = made
        return self._segments[key]

    def twin(self, tp: int) -> int:
        """The first tensor-parallel rank whose tensors have the shapes of those of ``tp``."""
        return self._twins[tp]

    @cached_property
    def _twins(self) -> tuple[int, ...]:
        sharding = self.sharding_at(self.plan.microbatches(0)[0])
        cuts = {p for p in sharding.placements.values() if isinstance(p, Shard)}
        shapes = [tuple(p.size(rank) for p in cuts) for rank in range(self.plan.mesh.tp)]
        return tuple(shapes.index(shape) for shape in shapes)


def _sized(graph: ModelGraph, microbatch: int, sequence: int | None) -> ModelGraph:
    if (graph.microbatch, graph.sequence) == (microbatch, sequence):
        return graph
    if not graph.is_scalable:
        raise PlanError(
            f"the graph holds for microbatches of {graph.microbatch} samples only, and the plan asks for {microbatch}",
            hint=f'--plan "...,mb={graph.microbatch}"',
        )
    return graph.at(microbatch=microbatch, sequence=sequence)


def _require_ops(graph: ModelGraph, plan: Plan) -> None:
    names = {op.name for op in graph.ops}
    for number, stage in enumerate(plan.stages):
        if stage.first not in names:
            raise PlanError(
                f"stage {number} begins at op {stage.first!r}, which the model does not have",
                hint=f'--plan "pp={len(plan.stages)}" cuts this model anew',
            )


def _stage_starts(graph: ModelGraph, stages: tuple[StageRange, ...]) -> tuple[int, ...]:
    """Index of the first op of each stage; an op that sharding put before another (``other@kind``) goes with that one."""
    first_index: dict[str, int] = {}
    for index, op in enumerate(graph.ops):
        first_index.setdefault(op.name.split("@")[0], index)
    return (0, *(first_index[stage.first] for stage in stages[1:]))
