"""Which tensors of a graph are changed in place, and between which ops they must not be separated."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from shardstage.graph.model_graph import ModelGraph, Op, Ref, Value

__all__ = ["Inseparable", "inseparable", "mutated", "storage_owner"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Inseparable:
    """``values``: all whose storage is changed in place. ``spans``: pairs of op indices that no cut may come between."""

    values: frozenset[str]
    spans: tuple[tuple[int, int], ...]


def mutated(op: Op) -> tuple[str, ...]:
    """Names of the values that an op changes in place: its first argument, or a normalisation's running statistics."""
    family = op.target.split(".")[1] if "." in op.target else op.target
    arguments: Iterable[object] = ()
    if family in _IN_PLACE_OPERATORS or (family.endswith("_") and not family.endswith("__")):
        arguments = op.args[:1]
    elif family in _NORMS_WITH_STATISTICS and len(op.args) > 5 and op.args[5] is True:
        arguments = op.args[3:5]
    return tuple(argument.name for argument in arguments if isinstance(argument, Ref))


def inseparable(graph: ModelGraph) -> Inseparable:
    """A tensor is not cut off from a later change of it; a buffer that is changed stays with all that read it."""
    owner = {name: storage_owner(graph, name).name for name in graph.values}
    changes: dict[str, int] = {}
    for index, op in enumerate(graph.ops):
        for name in mutated(op):
            changes[owner[name]] = index
    touches: dict[str, tuple[int, int]] = {}
    for index, op in enumerate(graph.ops):
        for name in (*op.inputs, *(name for name in op.outputs if name is not None)):
            if (storage := owner[name]) in changes:
                touches[storage] = (touches.get(storage, (index, 0))[0], index)
    made = graph.producer
    return Inseparable(
        values=frozenset(name for name, storage in owner.items() if storage in changes),
        spans=tuple(
            (first, changes[storage] if storage in made else last)
            for storage, (first, last) in touches.items()
        ),
    )


def storage_owner(graph: ModelGraph, name: str) -> Value:
    """The value whose storage ``name`` lies in: itself unless it is a view."""
    value = graph.values[name]
    while value.alias_of:
        value = graph.values[value.alias_of]
    return value


_IN_PLACE_OPERATORS: Final = frozenset({"__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__"})
_NORMS_WITH_STATISTICS: Final = frozenset({"batch_norm", "instance_norm"})
