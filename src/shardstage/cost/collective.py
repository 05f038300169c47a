"""How long ranks talk: the collectives inside a local graph, and those between its copies.

    seconds = latency_s + num_bytes / bytes_per_s

(Hockney's model; the cluster knows both for each kind, group and link). ``num_bytes`` is the whole tensor: what all_reduce reduces, what
all_gather returns, what reduce_scatter is given, padding included.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Final, Literal, NamedTuple

from shardstage.cluster import CollectiveKind
from shardstage.graph import ModelGraph, Op, Value
from shardstage.units import dtype_bytes

__all__ = ["Call", "calls_of", "is_communication"]


class Call(NamedTuple):
    """One collective of one microbatch along the tensor-parallel axis, of elements of ``dtype``."""

    kind: CollectiveKind
    num_bytes: int
    is_backward: bool
    dtype: str = "float32"

    @property
    def numel(self) -> int:
        return self.num_bytes // dtype_bytes(self.dtype)


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
    num_bytes = _padded_bytes(op, value)
    if forward:
        yield Call(forward, num_bytes, False, value.dtype)
    if backward and value.requires_grad:
        yield Call(backward, num_bytes, True, value.dtype)


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


def _padded_bytes(op: Op, value: Value) -> int:
    """Bytes of a whole tensor; where it is cut unevenly every rank's part travels as large as the largest."""
    sections = op.args[2] if len(op.args) > 2 else None
    if op.target not in _CUTTING or not isinstance(sections, tuple):
        return value.num_bytes
    held: list[int] = [sum(sizes) for sizes in zip(*sections, strict=True)]
    return value.num_bytes // max(1, sum(held)) * max(held) * len(held)


_CUTTING: Final = frozenset(
    f"shardstage.{name}" for name in ("all_gather", "gather_whole", "reduce_scatter", "slice")
)


def _cross_entropy_calls(graph: ModelGraph, op: Op) -> Iterator[Call]:
    """Over the vocabulary's shards: each target's maximum, then its sum of exponentials and its own logit in one call."""
    logits = graph.values[op.inputs[0]]
    row_bytes = logits.num_bytes // max(1, logits.shape[-1])
    yield Call("all_reduce", row_bytes, False, logits.dtype)
    yield Call("all_reduce", 2 * row_bytes, False, logits.dtype)
