"""The parameters of a pipeline rank: which gradients must be summed over which axes, and in which buckets they travel."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from shardstage.graph.cuts import Segment
from shardstage.layout import Mesh, Placement, Replicate, Shard
from shardstage.plan.plan import Plan
from shardstage.program.program import Collective
from shardstage.units import dtype_bytes

__all__ = [
    "HeldParameter",
    "Unit",
    "assign_buckets",
    "gradient_dtype",
    "held_parameters",
    "master_dtype",
    "needs_bucket",
    "row_range",
    "tie_axis",
    "unit_numel",
    "units_of",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldParameter:
    """A parameter as a pipeline rank holds it: ``shape`` is that of its tensor-parallel shard, ``stages`` all stages that use it.

    ``block`` is the one block of its stage that uses it, ``None`` where several do. ``ties`` are the pipeline ranks that hold it where
    there are several: they sum its gradient.
    """

    name: str
    fqn: str
    shape: tuple[int, ...]
    dtype: str
    placement: Placement
    stages: tuple[int, ...]
    ties: tuple[int, ...]
    block: int | None
    is_trained: bool

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def is_decayed(self) -> bool:
        """Weight decay is for matrices, not for biases and norms."""
        return len(self.shape) >= 2

    @property
    def is_tp_partial(self) -> bool:
        """Whether tensor-parallel ranks hold it whole and each sees a summand of its gradient."""
        return isinstance(self.placement, Replicate) and self.placement.has_partial_grad


class Unit(NamedTuple):
    """Parameters that ZeRO-2/3 shards over dp together, rows padded to a multiple of dp: a block's own, or (``None``) the stage's."""

    block: int | None
    bucket: str
    numel: int
    compute_dtype: str
    gradient_dtype: str
    is_trained: bool

    def gather(self) -> Collective:
        return Collective("dp", "all_gather", self.compute_dtype, self.numel, self.bucket)

    def reduce(self) -> Collective:
        return Collective("dp", "reduce_scatter", self.gradient_dtype, self.numel, self.bucket)


class _Way(NamedTuple):
    """Parameters share a bucket only if their gradients take the same way."""

    is_decayed: bool
    is_tp_sharded: bool
    is_tp_partial: bool
    ties: tuple[int, ...]


def held_parameters(
    segment: Segment,
    placements: Mapping[str, Placement],
    users: Mapping[str, tuple[int, ...]],
    stage_ranks: Sequence[int],
) -> tuple[HeldParameter, ...]:
    """A stage's parameters: those that several of its blocks use, then each block's own, as its ops read them.

    ``placements`` and ``users`` (the stages that use it, of whole graph) are by fqn.
    """
    graph = segment.graph
    fqns = {parameter.name: parameter.fqn for parameter in graph.parameters}
    by_block = [
        [n for n in dict.fromkeys(n for op in graph.ops[b.start : b.stop] for n in op.inputs) if n in fqns]
        for b in segment.blocks
    ]
    uses = Counter(name for names in by_block for name in names)
    order: list[tuple[str, int | None]] = [(name, None) for name, count in uses.items() if count > 1]
    order += [(name, number) for number, names in enumerate(by_block) for name in names if uses[name] == 1]
    return tuple(
        HeldParameter(
            name=name,
            fqn=fqns[name],
            shape=graph.values[name].shape,
            dtype=graph.values[name].dtype,
            placement=placements[fqns[name]],
            stages=users[fqns[name]],
            ties=_ties(users[fqns[name]], stage_ranks),
            block=block,
            is_trained=graph.values[name].requires_grad,
        )
        for name, block in order
    )


def _ties(users: Sequence[int], stage_ranks: Sequence[int]) -> tuple[int, ...]:
    ranks = sorted({stage_ranks[stage] for stage in users})
    return tuple(ranks) if len(ranks) > 1 else ()


def assign_buckets(
    stages: Iterable[Sequence[HeldParameter]], plan: Plan
) -> tuple[tuple[HeldParameter, ...], ...]:
    """All parameters of a pipeline rank whose gradients travel, in the buckets in which they do and the order in which they start.

    ``stages`` hold its stages' parameters, those first whose last backward comes first. A bucket fills in the order in which backward
    finishes parameters, holds at most ``bucket_bytes`` and only what takes one way. What several of the stages use comes last.
    A parameter that is tied across pipeline ranks has a bucket of its own, so that its flat shards lie alike on all of them.
    """
    by_stage = [[p for p in held if needs_bucket(p, plan)] for held in stages]
    uses = Counter(p.fqn for held in by_stage for p in held)
    shared = {p.fqn: p for held in by_stage for p in held if uses[p.fqn] > 1}
    own = [[p for p in held if p.fqn not in shared] for held in by_stage]
    return tuple(bucket for held in (*own, list(shared.values())) for bucket in _filled(held, plan))


def _filled(held: Sequence[HeldParameter], plan: Plan) -> Iterator[tuple[HeldParameter, ...]]:
    filling: dict[_Way, list[HeldParameter]] = {}
    filled_bytes: dict[_Way, int] = {}
    for parameter in reversed(held):
        way = _way(parameter)
        num_bytes = parameter.numel * dtype_bytes(parameter.dtype)
        if way in filling and (way.ties or filled_bytes[way] + num_bytes > plan.bucket_bytes):
            yield tuple(filling.pop(way))
        filling.setdefault(way, []).append(parameter)
        filled_bytes[way] = num_bytes + (filled_bytes[way] if len(filling[way]) > 1 else 0)
    for found in filling.values():
        yield tuple(found)


def needs_bucket(parameter: HeldParameter, plan: Plan) -> bool:
    """Whether its gradient is summed with other ranks', or kept apart from it in another dtype."""
    if not parameter.is_trained:
        return False
    is_shared = plan.mesh.dp > 1 or parameter.is_tp_partial or bool(parameter.ties)
    return is_shared or parameter.dtype != master_dtype(plan)


def units_of(
    held: Sequence[HeldParameter], plan: Plan
) -> tuple[tuple[int | None, tuple[HeldParameter, ...]], ...]:
    """Parameters by the block that owns them (``None``: the stage), in order of the blocks, as ZeRO-2/3 shards them."""
    blocks = sorted({p.block for p in held if p.block is not None})
    found: list[tuple[int | None, tuple[HeldParameter, ...]]] = [
        (block, tuple(p for p in held if p.block == block)) for block in blocks
    ]
    shared = tuple(p for p in held if p.block is None)
    return ((None, shared), *found) if shared else tuple(found)


def unit_numel(parameters: Iterable[HeldParameter], mesh: Mesh) -> int:
    """Elements of parameters whose rows are cut over dp, padding included."""
    return sum(
        -(-(p.shape[0] if p.shape else 1) // mesh.dp) * mesh.dp * math.prod(p.shape[1:]) for p in parameters
    )


def row_range(shape: tuple[int, ...], mesh: Mesh, dp: int) -> tuple[int, int]:
    """The rows of a local tensor that a dp rank keeps under ZeRO-2/3: ``torch.chunk`` along dim 0, as FSDP2 cuts."""
    num_rows = shape[0] if shape else 1
    size = -(-num_rows // mesh.dp) if num_rows else 0
    return min(dp * size, num_rows), min((dp + 1) * size, num_rows)


def master_dtype(plan: Plan) -> str:
    """Of master weights and optimizer state."""
    return "float64" if plan.precision == "float64" else "float32"


def gradient_dtype(plan: Plan) -> str:
    """Of gradients where they are summed."""
    return plan.gradient_dtype or master_dtype(plan)


def tie_axis(ranks: Sequence[int]) -> str:
    """The axis over which pipeline ranks that hold the same parameter sum its gradient: ``tie0+3``."""
    return f"tie{'+'.join(map(str, ranks))}"


def _way(parameter: HeldParameter) -> _Way:
    return _Way(
        is_decayed=parameter.is_decayed,
        is_tp_sharded=isinstance(parameter.placement, Shard),
        is_tp_partial=parameter.is_tp_partial,
        ties=parameter.ties,
    )
