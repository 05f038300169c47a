"""``saved_compiled``: what a block keeps for its backward where ``torch.compile`` has it; autograd keeps what each op asks for.

AOTAutograd cuts a block's joint graph of forward and backward where the fewest bytes cross (``torch/_functorch/partitioners.py``,
``min_cut_rematerialization_partition``): what pointwise ops, norms and softmax need is made again of what is kept anyway, or of less.

    kept of              eager                                     compiled
    a product            its operands                              the same
    attention, dropout,  what they ask for                         the same: none of them is computed again
    what talks
    any other op         what it asks for                          the least of that and of what it can be made of again: results of the
                                                                   ops above, and what the block is given

A sum in front of a norm in float32, the copies of it that a written-out norm makes, an activation's result beside its operand: none of
these is kept. Here op after op takes the least, where torch solves for all at once; in the layers of ``tests/graph/test_saved_compiled.py``
both keep the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Final

from shardstage.graph.blocks import Block
from shardstage.graph.model_graph import ModelGraph, Op

__all__ = ["POINTWISE", "saved_compiled"]

POINTWISE: Final = frozenset(
    f"aten.{name}"
    for name in (
        *("add", "sub", "mul", "div", "neg", "pow", "rsqrt", "sqrt", "exp", "tanh", "sigmoid", "reciprocal"),
        *("gelu", "silu", "relu", "to", "masked_fill", "where", "clamp", "mean"),
    )
)
"""Families of ops that a compiler fuses with each other."""

_AGAIN: Final = POINTWISE | {
    f"aten.{name}"
    for name in (
        *(
            "layer_norm",
            "native_layer_norm",
            "rms_norm",
            "softmax",
            "_softmax",
            "log_softmax",
            "_log_softmax",
        ),
        *("cross_entropy_loss", "contiguous", "clone", "reshape", "_to_copy", "square", "type_as", "float"),
    )
}
_STORED: Final = ("parameter", "buffer", "constant")


def saved_compiled(graph: ModelGraph, blocks: Sequence[Block]) -> ModelGraph:
    """The graph, whole or of a rank or stage, with ``Op.saved`` as where each of its blocks is compiled."""
    saved: dict[str, tuple[str, ...]] = {}
    for block in blocks:
        saved |= _saved_of(graph, graph.ops[block.start : block.stop])
    return replace(
        graph, ops=tuple(replace(op, saved=saved[op.name]) if op.name in saved else op for op in graph.ops)
    )


def _saved_of(graph: ModelGraph, ops: Sequence[Op]) -> dict[str, tuple[str, ...]]:
    """Of ops compiled together what those keep that can be computed again; the others keep what they did."""
    again = {op.name: op for op in ops if _is_again(graph, op)}
    maker = {name: op for op in again.values() for name in op.outputs if name is not None}
    kept = {_storage(graph, name) for op in ops if op.name not in again for name in op.saved}
    saved = {}
    for op in again.values():
        found: list[str] = []
        for name in op.saved:
            own = op.inputs if graph.values[name].kind == "saved" else (name,)
            sources = _sources(graph, own, maker)
            least = min(([name], sources), key=lambda names: _new_bytes(graph, names, kept))
            kept |= {_storage(graph, each) for each in least}
            found += least
        saved[op.name] = tuple(dict.fromkeys(found))
    return saved


def _is_again(graph: ModelGraph, op: Op) -> bool:
    """Whether an op may be computed again: it is pointwise, normalises, or makes views."""
    family = ".".join(op.target.split(".")[:2])
    outputs = [name for name in op.outputs if name is not None]
    return family in _AGAIN or all(graph.values[name].alias_of for name in outputs)


def _sources(graph: ModelGraph, names: Iterable[str], maker: dict[str, Op]) -> list[str]:
    """What values are made of, back to what cannot be computed again or comes from outside; nothing that is stored anyway."""
    found: dict[str, None] = {}
    todo, seen = list(names), set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in maker:
            todo += maker[name].inputs
        elif graph.values[name].kind not in _STORED:
            found[name] = None
    return list(found)


def _new_bytes(graph: ModelGraph, names: Iterable[str], kept: set[str]) -> int:
    """Of storages that are not kept yet."""
    storages = {_storage(graph, name) for name in names} - kept
    return sum(graph.values[name].num_bytes for name in storages if graph.values[name].kind not in _STORED)


def _storage(graph: ModelGraph, name: str) -> str:
    while graph.values[name].alias_of:
        name = graph.values[name].alias_of
    return name
