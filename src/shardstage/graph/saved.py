"""Bytes that a stage keeps from a microbatch's forward to its backward, and what recomputing them costs.

    recompute    kept of a layer                                              computed again
    none         what autograd saves of each op                               nothing
    selective    its inputs, and the results of products and attention        everything else
    full         its inputs                                                   everything

Where ``modules`` are named, selective means the ops in these: of a layer each run of them in full, the rest not (``named_modules``).
Only layers are recomputed (``Block.is_layer``), all of a stage or its first ones (``recompute``): the embedding and the head with its loss
keep their few, large tensors. Bytes count storages, once each; parameters and buffers live anyway, and what carries no gradient of the
batch is listed apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from shardstage.graph.attention import ATTENTION, DROPPING_ATTENTION, is_attention, kept_scores
from shardstage.graph.blocks import Block, within
from shardstage.graph.flops import forward_flops
from shardstage.graph.model_graph import ModelGraph, Op
from shardstage.graph.named_modules import Part, recompute_parts
from shardstage.graph.recompute import StageRecompute

__all__ = [
    "SELECTIVE_TARGETS",
    "extra_values",
    "is_of_batch",
    "peak_extra_bytes",
    "recompute_flops",
    "recomputed_of",
    "recomputed_ops",
    "saved_bytes",
    "saved_input_bytes",
    "saved_values",
    "transient_bytes",
    "working_sets",
]

# What selective recomputation keeps the results of. Half of the names are those of a graph, the others what torch calls in their
# place when an op runs, which is where its selective checkpoint decides.
SELECTIVE_TARGETS: Final = (
    *("aten.linear.default", "aten.matmul.default", "aten.einsum.default"),
    *("aten.mm.default", "aten.bmm.default", "aten.addmm.default", "aten.baddbmm.default"),
    *("aten.conv1d.default", "aten.conv2d.default", "aten.conv3d.default"),
    *("aten.conv1d.padding", "aten.conv2d.padding", "aten.conv3d.padding"),
    *("aten.conv_transpose1d.default", "aten.conv_transpose2d.input", "aten.conv_transpose3d.input"),
    "aten.convolution.default",
    *(ATTENTION, DROPPING_ATTENTION),
    "aten._scaled_dot_product_flash_attention_for_cpu.default",
    "aten._scaled_dot_product_flash_attention.default",
    "aten._scaled_dot_product_efficient_attention.default",
    "aten._scaled_dot_product_cudnn_attention.default",
    "aten._scaled_dot_product_fused_attention_overrideable.default",
)


def saved_bytes(
    graph: ModelGraph,
    start: int,
    stop: int,
    recompute: StageRecompute,
    *,
    blocks: Sequence[Block] | None = None,
    modules: Sequence[str] = (),
) -> int:
    """Bytes that ops[start:stop] keep of one microbatch until its backward, without parameters, buffers and the batch.

    ``blocks`` are those of the graph, to save finding them again; ``modules`` says what selective means.
    """
    names = saved_values(graph, start, stop, recompute, blocks=blocks, modules=modules)
    return sum(graph.values[name].num_bytes for name in names if not is_of_batch(graph, name))


def saved_input_bytes(
    graph: ModelGraph,
    start: int,
    stop: int,
    recompute: StageRecompute,
    *,
    blocks: Sequence[Block] | None = None,
    modules: Sequence[str] = (),
) -> int:
    """Bytes of the batch's own tensors that ops[start:stop] keep, such as token ids and labels."""
    names = saved_values(graph, start, stop, recompute, blocks=blocks, modules=modules)
    return sum(graph.values[name].num_bytes for name in names if is_of_batch(graph, name))


def saved_values(
    graph: ModelGraph,
    start: int,
    stop: int,
    recompute: StageRecompute,
    *,
    blocks: Sequence[Block] | None = None,
    modules: Sequence[str] = (),
) -> tuple[str, ...]:
    """The values whose storages ops[start:stop] keep, each storage once; parameters, buffers and constants left out.

    A view of a tensor that an earlier stage made counts by itself, for only the view has travelled.
    """
    owners: dict[str, None] = {}
    for part in _parts(graph, start, stop, recompute, blocks, modules):
        for name in _kept_of(graph, part):
            owners[_owner_from(graph, name, start)] = None
    stored = ("parameter", "buffer", "constant")
    return tuple(name for name in owners if graph.values[name].kind not in stored)


def recompute_flops(
    graph: ModelGraph,
    start: int,
    stop: int,
    recompute: StageRecompute,
    *,
    blocks: Sequence[Block] | None = None,
    modules: Sequence[str] = (),
) -> int:
    """FLOPs of computing again what ops[start:stop] did not keep of one microbatch.

    As torch's checkpoint does, a layer is computed again only as far as its backward needs.
    """
    return sum(
        forward_flops(graph, op)
        for op in recomputed_ops(graph, start, stop, recompute, blocks=blocks, modules=modules)
    )


def recomputed_ops(
    graph: ModelGraph,
    start: int,
    stop: int,
    recompute: StageRecompute,
    *,
    blocks: Sequence[Block] | None = None,
    modules: Sequence[str] = (),
) -> Iterator[Op]:
    """The ops among ops[start:stop] that are computed again."""
    for part in _parts(graph, start, stop, recompute, blocks, modules):
        yield from recomputed_of(graph, part)


def peak_extra_bytes(
    graph: ModelGraph,
    start: int,
    stop: int,
    recompute: StageRecompute,
    *,
    blocks: Sequence[Block] | None = None,
    modules: Sequence[str] = (),
) -> int:
    """The most that recomputing a layer of ops[start:stop], or a run in named modules, brings back at once, beyond what is kept anyway."""
    layers = extra_values(graph, start, stop, recompute, blocks=blocks, modules=modules)
    return max((sum(graph.values[name].num_bytes for name in names) for names in layers), default=0)


def extra_values(
    graph: ModelGraph,
    start: int,
    stop: int,
    recompute: StageRecompute,
    *,
    blocks: Sequence[Block] | None = None,
    modules: Sequence[str] = (),
) -> Iterator[tuple[str, ...]]:
    """For each layer of ops[start:stop] the values that recomputing it brings back, beyond what is kept anyway.

    For each run in named modules what it makes: a result of it that is kept comes back a second time.
    """
    if recompute == "none":
        return
    kept = set(saved_values(graph, start, stop, recompute, blocks=blocks, modules=modules))
    for part in _parts(graph, start, stop, recompute, blocks, modules):
        if part.mode != "none":
            names = saved_values(graph, part.start, part.stop, "none", blocks=())
            if part.is_named:
                made = _made_in(graph, part)
                yield tuple(name for name in names if name in made)
            else:
                yield tuple(name for name in names if name not in kept and not is_of_batch(graph, name))


def transient_bytes(graph: ModelGraph, start: int, stop: int) -> int:
    """The largest working set of one op among ops[start:stop]: what it reads and writes, and autograd's own copies of that.

    Its backward needs as much again for gradients: think of logits in float32 under their loss.
    """
    sets = working_sets(graph, start, stop)
    return max((sum(graph.values[name].num_bytes for name in names) for names in sets), default=0)


def working_sets(graph: ModelGraph, start: int, stop: int) -> Iterator[tuple[str, ...]]:
    """For each op of ops[start:stop] what it reads, writes and saves, weights left out: one name for each storage."""
    return (tuple(_distinct(graph, op)) for op in graph.ops[start:stop])


def is_of_batch(graph: ModelGraph, name: str) -> bool:
    """Whether the value came with the batch and carries no gradient, such as token ids."""
    value = graph.values[name]
    return value.kind == "input" and not value.requires_grad


def _parts(
    graph: ModelGraph,
    start: int,
    stop: int,
    recompute: StageRecompute,
    blocks: Sequence[Block] | None,
    modules: Sequence[str],
) -> Iterable[Part]:
    """Blocks, or parts of them, with what each recomputes."""
    if recompute == "none":
        return (Part(start, stop, "none"),)
    own = within(graph, graph.blocks if blocks is None else blocks, start, stop)
    return (part for parts in recompute_parts(graph, own, recompute, modules) for part in parts)


def _made_in(graph: ModelGraph, part: Part) -> frozenset[str]:
    ops = graph.ops[part.start : part.stop]
    made = (name for op in ops for name in (*op.outputs, *op.saved) if name is not None)
    given = (name for op in ops for name in op.inputs if graph.producer.get(name, -1) < part.start)
    return frozenset(made) - frozenset(given)


def _kept_of(graph: ModelGraph, part: Part) -> Iterator[str]:
    ops = graph.ops[part.start : part.stop]
    if part.mode == "none":
        yield from (name for op in ops for name in op.saved)
        return
    made = {name for op in ops for name in op.outputs}
    yield from (name for op in ops for name in op.inputs if name not in made)
    if part.mode == "selective":
        for op in filter(_is_selected, ops):
            yield from (name for name in op.outputs if name is not None)
            yield from _kept_within(graph, op)


def _kept_within(graph: ModelGraph, op: Op) -> Iterator[str]:
    """Results of products inside an op: fused attention returns its log-sum-exp, attention written out has scores [.., s, t]."""
    if "attention" in op.target:
        own = [name for name in op.saved if graph.values[name].kind == "saved"]
        scores = kept_scores(graph, op) if is_attention(op) else []
        yield from scores[:1] or own


def _is_selected(op: Op) -> bool:
    return op.target in _SELECTED


_SELECTED: Final = frozenset(SELECTIVE_TARGETS)


def recomputed_of(graph: ModelGraph, part: Part) -> Iterator[Op]:
    """The ops of one part that are computed again."""
    if part.mode == "none":
        return
    ops = graph.ops[part.start : part.stop]
    saving = [index for index, op in enumerate(ops) if op.saved]
    last = saving[-1] if saving else -1
    for index, op in enumerate(ops[: last + 1]):
        is_needed = index < last or not set(op.saved) <= set(op.inputs)
        if is_needed and not (part.mode == "selective" and _is_selected(op)):
            yield op


def _owner_from(graph: ModelGraph, name: str, start: int) -> str:
    """The value whose storage ``name`` lies in, as far as a stage knows that begins at op ``start``."""
    producer = graph.producer
    while (viewed := graph.values[name].alias_of) and producer.get(name, start) >= start:
        name = viewed
    return name


def _distinct(graph: ModelGraph, op: Op) -> Iterable[str]:
    """One name per storage among what an op reads, writes and saves, weights left out."""
    names = [*op.inputs, *(name for name in op.outputs if name is not None), *op.saved]
    owners = {_owner_from(graph, name, 0): name for name in names}
    return [
        name
        for owner, name in owners.items()
        if graph.values[owner].kind not in ("parameter", "buffer", "constant")
    ]
