"""Which values of a graph depend on the batch."""

from __future__ import annotations

from shardstage.graph import ModelGraph

__all__ = ["values_of_batch"]


def values_of_batch(graph: ModelGraph) -> frozenset[str]:
    """The inputs and what is computed from them: ids and activations, but neither positions nor tables."""
    found = set(graph.inputs)
    for op in graph.ops:
        if not found.isdisjoint(op.inputs):
            found.update(name for name in op.outputs if name is not None)
    return frozenset(found)
