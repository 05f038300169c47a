"""``num_positions``: how many tokens a model has positions for, by the table that its graph looks them up in."""

from __future__ import annotations

from typing import Any

from shardstage.graph.model_graph import ModelGraph, Op, Ref

__all__ = ["num_positions"]


def num_positions(graph: ModelGraph) -> int | None:
    """The rows of the smallest table that is looked up by 0, 1, …, S - 1, for a graph of S tokens; None where there is none.

    Tracing sees no number that lies beyond a table: a model with too few positions is captured, and fails in its first step.
    """
    made = {name: op for op in graph.ops for name in op.outputs if name is not None}
    sizes = (
        graph.values[op.args[0].name].shape[0]
        for op in graph.ops
        if op.target == "aten.embedding.default" and _counts_tokens(graph, made, op.args[1])
    )
    return min(sizes, default=None)


def _counts_tokens(graph: ModelGraph, made: dict[str, Op], index: Any) -> bool:
    """Whether an index counts from 0 to the length, through whatever views."""
    while isinstance(index, Ref) and index.name in made:
        op = made[index.name]
        if op.target.startswith("aten.arange."):
            ends = (graph.sequence,) if op.target == "aten.arange.default" else (0, graph.sequence)
            return op.args[: len(ends)] == ends
        if not graph.values[index.name].alias_of:
            return False
        index = op.args[0]
    return False
