"""What autograd keeps of our own operators: the values that a local graph lists as ``saved`` in place of torch's."""

from __future__ import annotations

from collections.abc import Mapping

from shardstage.graph import Op, Ref, Value

__all__ = ["kept_of"]

Kept = tuple[tuple[str, tuple[int, ...], str], ...]
"""(suffix of the name, shape, dtype; "" for that of the first input)."""


def kept_of(op: Op, values: Mapping[str, Value]) -> tuple[tuple[str, ...], tuple[Value, ...]] | None:
    """Names of the inputs that a local op keeps, and the further tensors that it makes and keeps; None for torch's ops."""
    inputs = [values[a.name] for a in op.args if isinstance(a, Ref)]
    names: tuple[str, ...]
    match op.target:
        case "shardstage.dropout":
            names, made = (), _of_dropout(inputs[0])
        case "shardstage.cross_entropy":
            names, made = (inputs[0].name,), _of_cross_entropy(inputs[0])
        case "shardstage.embedding":
            names, made = (), _of_embedding(inputs[1])
        case "shardstage.attention":
            names, made = (inputs[1].name, inputs[2].name), _of_attention(inputs[0], inputs[1])
        case _:
            return None
    first = inputs[0].dtype
    return names, tuple(
        Value(name=f"{op.name}#{suffix}", shape=shape, dtype=dtype or first, kind="saved")
        for suffix, shape, dtype in made
    )


def _of_dropout(x: Value) -> Kept:
    return (("kept", x.shape, "bool"),)


def _of_cross_entropy(logits: Value) -> Kept:
    targets = logits.shape[:1]
    return (
        ("log_normaliser", targets, ""),
        ("local_labels", targets, "int64"),
        ("is_elsewhere", targets, "bool"),
        ("is_target", targets, "bool"),
    )


def _of_embedding(ids: Value) -> Kept:
    return (("local_ids", ids.shape, ids.dtype), ("is_elsewhere", ids.shape, "bool"))


def _of_attention(query: Value, key: Value) -> Kept:
    scores = (*query.shape[:-1], key.shape[-2])
    return (
        ("scaled_query", query.shape, ""),
        ("probabilities", scores, "float64" if query.dtype == "float64" else "float32"),
        ("kept", scores, "bool"),
        ("dropped", scores, ""),
    )
