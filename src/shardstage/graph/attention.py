"""Attention as one op of a graph: what it reads, how it is asked for, and whether it keeps its scores."""

from __future__ import annotations

from typing import Final, NamedTuple

from shardstage.graph.model_graph import ModelGraph, Op, Ref

__all__ = [
    "ATTENTION",
    "DROPPING_ATTENTION",
    "AttentionOperands",
    "attention_operands",
    "draws_attention",
    "is_attention",
    "is_causal",
    "kept_scores",
]

ATTENTION: Final = "aten.scaled_dot_product_attention.default"

DROPPING_ATTENTION: Final = "shardstage.attention"
"""With dropout, whose random numbers are ours."""


class AttentionOperands(NamedTuple):
    """Names of what it reads; the same value may be several of these."""

    query: str
    key: str
    value: str
    mask: str | None


def is_attention(op: Op) -> bool:
    """Whether the op is all of attention: one kernel, or several where it is written out."""
    return op.target in (ATTENTION, DROPPING_ATTENTION)


def attention_operands(op: Op) -> AttentionOperands:
    """Of an op that ``is_attention``."""
    given = dict(zip(("query", "key", "value", "attn_mask"), op.args, strict=False)) | dict(op.kwargs)
    query, key, value = (given[name].name for name in ("query", "key", "value"))
    mask = given.get("attn_mask")
    return AttentionOperands(query, key, value, mask.name if isinstance(mask, Ref) else None)


def draws_attention(op: Op) -> bool:
    """Whether it drops probabilities."""
    return bool((op.args[4] if len(op.args) > 4 else dict(op.kwargs).get("dropout_p", 0.0)) > 0)


def is_causal(op: Op) -> bool:
    """Whether no token attends to a later one."""
    return (op.args[5] if len(op.args) > 5 else dict(op.kwargs).get("is_causal")) is True


def kept_scores(graph: ModelGraph, op: Op) -> list[str]:
    """What an op that ``is_attention`` keeps of the size of its scores [.., s, t] within itself: only where it is written out."""
    operands = attention_operands(op)
    query, key = graph.values[operands.query], graph.values[operands.key]
    rows, columns = query.shape[-2], key.shape[-2]
    num_scores = query.numel // query.shape[-1] * columns
    own = ((name, graph.values[name]) for name in op.saved if graph.values[name].kind == "saved")
    return [n for n, v in own if v.numel >= num_scores and v.shape[-2:] == (rows, columns)]
