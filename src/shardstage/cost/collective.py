"""How long ranks talk: the collectives inside a local graph, and those between its copies.

    seconds = latency_s + num_bytes / bytes_per_s

(Hockney's model; the cluster knows both for each kind, group and link). ``num_bytes`` is the whole tensor: what all_reduce reduces, what
all_gather returns, what reduce_scatter is given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Final, Literal, NamedTuple

from shardstage.cluster import CollectiveKind
from shardstage.graph import ModelGraph, Op

__all__ = ["Call", "calls_of", "is_communication"]


class Call(NamedTuple):
    """One collective of one microbatch along the tensor-parallel axis."""

    kind: CollectiveKind
    num_bytes: int
    is_backward: bool


def calls_of(graph: ModelGraph, op: Op) -> Iterator[Call]:
    """The collectives that an op of a local graph runs, forward and backward; none for an op that only computes."""
    if op.target == "shardstage.cross_entropy":
        yield from _cross_entropy_calls(graph, op)
        return
    if op.target not in _CALLS:
        return
    forward, backward, side = _CALLS[op.target]
    name = op.inputs[0] if side == "in" else op.outputs[0]
    assert name is not None
    value = graph.values[name]
    if forward:
        yield Call(forward, value.num_bytes, False)
    if backward and value.requires_grad:
        yield Call(backward, value.num_bytes, True)


def is_communication(op: Op) -> bool:
    """Whether the op only moves data between ranks, or marks where its gradient will."""
    return op.target in _CALLS


_Kind = CollectiveKind | None
_CALLS: Final[Mapping[str, tuple[_Kind, _Kind, Literal["in", "out"]]]] = MappingProxyType(
    {  # target: forward, backward, which of its tensors is whole
        "shardstage.sum_gradient": (None, "all_reduce", "in"),
        "shardstage.all_reduce": ("all_reduce", None, "in"),
        "shardstage.all_gather": ("all_gather", "reduce_scatter", "out"),
        "shardstage.gather_whole": ("all_gather", None, "out"),
        "shardstage.reduce_scatter": ("reduce_scatter", "all_gather", "in"),
        "shardstage.slice": (None, "all_gather", "in"),
        "shardstage.narrow": (None, None, "in"),
    }
)


def _cross_entropy_calls(graph: ModelGraph, op: Op) -> Iterator[Call]:
    """Over the vocabulary's shards: each target's maximum, then its sum of exponentials and its own logit in one call."""
    logits = graph.values[op.inputs[0]]
    row_bytes = logits.num_bytes // max(1, logits.shape[-1])
    yield Call("all_reduce", row_bytes, False)
    yield Call("all_reduce", 2 * row_bytes, False)
