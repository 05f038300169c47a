"""``can_share_sequences``: whether ranks can have parts of a sequence each; ``require_shared`` refuses where they cannot."""

from __future__ import annotations

from shardstage.errors import PlanError
from shardstage.graph import ModelGraph, Op
from shardstage.graph.attention import is_attention
from shardstage.sharding.rules import is_random

__all__ = ["can_share_sequences", "require_shared"]


def can_share_sequences(graph: ModelGraph) -> bool:
    """Whether there is attention, and all of it runs as one kernel, which context parallelism can feed part by part."""
    return any(map(is_attention, graph.ops)) and not _is_written_out(graph)


def require_shared(cp: int, graph: ModelGraph) -> None:
    """Raises ``PlanError`` where attention keeps ``cp`` ranks from sharing sequences."""
    if cp > 1 and _is_written_out(graph):
        raise PlanError(
            f"cp={cp} shares sequences, and this model's attention is written out, not a kernel that could compute it part by part",
            hint=f"leave out cp={cp}, or set the model's attention dropout to 0 if it has one",
        )


def _is_written_out(graph: ModelGraph) -> bool:
    """By the model itself, whose softmax then goes over all tokens, and perhaps a sink; or because it drops probabilities."""
    return any(is_random(op) if is_attention(op) else _goes_over_tokens(graph, op) for op in graph.ops)


def _goes_over_tokens(graph: ModelGraph, op: Op) -> bool:
    if graph.sequence is None or not op.target.startswith(("aten.softmax", "aten._softmax")):
        return False
    return graph.values[op.inputs[0]].shape[-1] - graph.sequence in (0, 1)
