"""``fused``: the kernels of a run of ops whose pointwise chains are compiled into one kernel each (``torch.compile``, TorchScript).

    bias → gelu          dropout → +          scale → mask → softmax          one kernel forward, one backward

A chain is a group of pointwise ops that feed each other; a softmax ends one. It reads what comes from outside, and writes what is read
outside or kept for the backward; backward it reads the gradients of what left it and what was kept, and writes those of what came in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from shardstage.cost.collective import is_communication
from shardstage.cost.kernels import Kernel, KernelReader
from shardstage.graph import ModelGraph, Op
from shardstage.graph.saved_compiled import POINTWISE

__all__ = ["fused", "kernels_of"]


def kernels_of(
    graph: ModelGraph, reader: KernelReader, ops: Sequence[Op], *, is_compiled: bool
) -> tuple[Kernel, ...]:
    """Kernels of ``ops``, forward and backward, compiled or one by one; of what only talks, the sums of its results' gradients."""
    computing = [op for op in ops if not is_communication(op)]
    talked = [name for op in ops if is_communication(op) for name in op.outputs]
    if is_compiled:
        kernels = fused(graph, reader, computing)
    else:
        kernels = tuple(kernel for op in computing for kernel in reader.kernels(op))
    return (*kernels, *reader.gradient_sums(talked))


def fused(graph: ModelGraph, reader: KernelReader, ops: Sequence[Op]) -> tuple[Kernel, ...]:
    """Kernels of ``ops``, forward and backward."""
    readers = _reader_ops(graph)
    return tuple(
        kernel
        for chain in _chains(ops)
        for kernel in (
            reader.kernels(chain[0]) if len(chain) == 1 else _of_chain(graph, reader, chain, readers)
        )
    )


def _chains(ops: Sequence[Op]) -> list[list[Op]]:
    """Groups in the order of their first ops; an op that is not pointwise is a group of one."""
    chains: list[list[Op]] = []
    chain_of: dict[str, list[Op]] = {}  # by value that the chain has made and may go on from
    for op in ops:
        family = ".".join(op.target.split(".")[:2])
        before = next((chain_of[name] for name in op.inputs if name in chain_of), None)
        if family in _POINTWISE or (family in _ENDS and before is not None):
            if before is None:
                before = []
                chains.append(before)
            before.append(op)
            if family in _POINTWISE:
                chain_of |= {name: before for name in op.outputs if name is not None}
        else:
            chains.append([op])
    return chains


def _of_chain(
    graph: ModelGraph, reader: KernelReader, chain: Sequence[Op], readers: dict[str, set[str]]
) -> Iterator[Kernel]:
    values = graph.values
    inside = {op.name for op in chain}
    made = {name for op in chain for name in op.outputs if name is not None}
    read = list(dict.fromkeys(name for op in chain for name in op.inputs if name not in made))
    kept = list(dict.fromkeys(name for op in chain for name in op.saved))
    leaving = [name for name in made if readers.get(name, set()) - inside or name == graph.output]
    written = [*leaving, *(name for name in kept if name not in leaving and name not in read)]
    yield Kernel("moved", False, *reader.moved((*read, *written)))
    gradients = [name for name in leaving if values[name].requires_grad]
    wanted = [name for name in read if values[name].requires_grad and values[name].kind != "parameter"]
    if gradients and wanted:
        yield Kernel("moved", True, *reader.moved((*gradients, *kept, *wanted)))
    yield from reader.gradient_sums(leaving)


def _reader_ops(graph: ModelGraph) -> dict[str, set[str]]:
    readers: dict[str, set[str]] = {}
    for op in graph.ops:
        for name in op.inputs:
            readers.setdefault(name, set()).add(op.name)
    return readers


_POINTWISE: Final = POINTWISE | {"aten.dropout", "shardstage.dropout"}
_ENDS: Final = frozenset({"aten.softmax", "aten._softmax"})
