"""Cutting a graph into stages at any op: what must travel, what is computed again, and what each stage holds.

    position p: │ ops[:p] ┃ ops[p:] │      crossing(p): the values that are made left of ┃ and read right of it

Values that carry no gradient and follow cheaply from the batch (rotary tables, masks, position ids) never travel: each stage that
reads one computes it again. A value goes straight to every stage that reads it, however many lie between.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Final

from shardstage.errors import PlanError
from shardstage.graph.blocks import Block, fingerprint, within
from shardstage.graph.flops import forward_flops
from shardstage.graph.model_graph import ModelGraph, Op, Parameter, Value
from shardstage.graph.mutation import inseparable, storage_owner

__all__ = [
    "Edge",
    "Segment",
    "all_crossing_bytes",
    "cheap_ops",
    "crossing",
    "crossing_bytes",
    "cut",
    "good_positions",
    "shared_parameters",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Edge:
    """A value that travels from the stage that makes it to one that reads it.

    ``requires_grad``: a gradient flows back over it.
    """

    value: str
    source: int
    target: int
    requires_grad: bool


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One stage's part of a graph.

    ``graph`` holds its own ops after those that it computes again, and of values, parameters, buffers, constants and inputs what these
    read; a received value is one of its inputs. ``num_recomputed`` of its ops belong to earlier stages. ``blocks`` are those of the
    whole graph as far as they lie in this stage.
    """

    index: int
    graph: ModelGraph
    receives: tuple[Edge, ...]
    sends: tuple[Edge, ...]
    num_recomputed: int = 0
    blocks: tuple[Block, ...] = ()


def crossing(graph: ModelGraph, position: int) -> tuple[str, ...]:
    """Names of the values that must travel if ops[:position] and ops[position:] lie on different stages, in graph order."""
    return tuple(name for name, first, last in _spans(graph) if first < position <= last)


def crossing_bytes(graph: ModelGraph, position: int) -> int:
    return sum(graph.values[name].num_bytes for name in crossing(graph, position))


def all_crossing_bytes(graph: ModelGraph) -> tuple[int, ...]:
    """``crossing_bytes`` at every position 0 … len(ops), in linear time."""
    return _sums(graph, {name: graph.values[name].num_bytes for name, _, _ in _spans(graph)})


def good_positions(graph: ModelGraph) -> tuple[int, ...]:
    """Positions between and within blocks where the least travels: those with only the residual stream, and skips past it.

    A good position is a local minimum of the crossing bytes that no other in its block undercuts. Of neighbours at which the same
    travels it is the one between blocks, or where the outermost module changes.
    """
    num_bytes = all_crossing_bytes(graph)
    blocks = graph.blocks
    borders = {block.start for block in blocks}
    lowest = [min(filter(None, num_bytes[b.start : b.stop + 1]), default=0) for b in blocks]
    block_of = [number for number, block in enumerate(blocks) for _ in range(block.start, block.stop)]
    found = []
    for plateau in _valleys(num_bytes, _allowed(graph)):
        position = min(plateau, key=lambda p: (p not in borders, _common_depth(graph.ops, p)))
        around = {block_of[position - 1], block_of[position]}
        if num_bytes[position] <= max(lowest[number] for number in around):
            found.append(position)
    return tuple(found)


def cut(graph: ModelGraph, starts: Sequence[int]) -> tuple[Segment, ...]:
    """The stages whose first ops are ``graph.ops[starts[i]]``; ``starts`` begins with 0 and rises.

    Raises ``PlanError`` for other starts, and for a cut between a tensor's making and its change in place.
    """
    _require_valid(graph, starts)
    bounds = list(pairwise([*starts, len(graph.ops)]))
    cheap = cheap_ops(graph)
    members = [_members(graph, start, stop, cheap) for start, stop in bounds]
    edges = _edges(graph, starts, members, cheap)
    blocks = graph.blocks
    return tuple(
        _segment(graph, index, indices, bounds[index], edges, blocks) for index, indices in enumerate(members)
    )


def shared_parameters(segments: Sequence[Segment]) -> dict[str, tuple[int, ...]]:
    """The parameters that several stages use: fqn → those stages, in order. Their gradients must be summed."""
    stages: dict[str, list[int]] = {}
    for segment in segments:
        for parameter in segment.graph.parameters:
            stages.setdefault(parameter.fqn, []).append(segment.index)
    return {fqn: tuple(indices) for fqn, indices in stages.items() if len(indices) > 1}


_RANDOM: Final = frozenset(
    f"aten.{name}"
    for name in (
        *("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "bernoulli"),
        *("normal", "multinomial", "poisson", "dropout", "native_dropout", "alpha_dropout"),
        *("feature_dropout", "rrelu", "empty", "empty_like", "new_empty"),
    )
)
# Of our own operators, those that neither communicate nor draw.
_LOCAL_OPERATORS: Final = frozenset(f"shardstage.{name}" for name in ("narrow", "slice", "select_heads"))
# A product over fewer terms than this costs no more than reading its operands: an outer product of positions and frequencies.
_CHEAP_TERMS: Final = 16


def cheap_ops(graph: ModelGraph) -> list[bool]:
    """Whether each op is computed again rather than its results sent."""
    pinned = inseparable(graph).values
    is_cheap_value = {
        name: value.kind in ("input", "buffer", "constant") and not value.requires_grad and name not in pinned
        for name, value in graph.values.items()
    }
    is_cheap: list[bool] = []
    for op in graph.ops:
        outputs = [name for name in op.outputs if name is not None]
        cheap = (
            all(is_cheap_value[name] for name in op.inputs)
            and not any(graph.values[name].requires_grad or name in pinned for name in outputs)
            and _has_cheap_target(graph, op)
        )
        is_cheap.append(cheap)
        is_cheap_value.update(dict.fromkeys(outputs, cheap))
    return is_cheap


def _has_cheap_target(graph: ModelGraph, op: Op) -> bool:
    family = ".".join(op.target.split(".")[:2])
    if family in _RANDOM or family.endswith("_"):
        return False
    if family.startswith("shardstage."):
        return family in _LOCAL_OPERATORS
    results = sum(graph.values[name].numel for name in op.outputs if name is not None)
    return forward_flops(graph, op) <= 2 * _CHEAP_TERMS * results


def _spans(graph: ModelGraph) -> list[tuple[str, int, int]]:
    """Each value that may travel, with the index of the op that makes it and of the last that reads it."""
    cheap = cheap_ops(graph)
    consumers = graph.consumers
    return [
        (name, index, consumers[name][-1])
        for index, op in enumerate(graph.ops)
        if not cheap[index]
        for name in op.outputs
        if name is not None and consumers[name]
    ]


def _sums(graph: ModelGraph, weights: Mapping[str, int]) -> tuple[int, ...]:
    """At every position the sum of the weights of the values that cross it."""
    changes = [0] * (len(graph.ops) + 1)
    for name, first, last in _spans(graph):
        changes[first + 1] += weights[name]
        changes[last + 1] -= weights[name]
    return tuple(accumulate(changes))


def _allowed(graph: ModelGraph) -> list[bool]:
    """Whether each position separates no tensor from its change in place."""
    changes = [0] * (len(graph.ops) + 2)
    for first, last in inseparable(graph).spans:
        changes[first + 1] += 1
        changes[last + 1] -= 1
    return [count == 0 for count in accumulate(changes)]


def _valleys(num_bytes: Sequence[int], is_allowed: Sequence[bool]) -> Iterator[list[int]]:
    """The allowed positions of each stretch of equal, positive height between higher ones."""
    start, end = 1, len(num_bytes) - 1
    while start < end:
        stop = start
        while stop + 1 < end and num_bytes[stop + 1] == num_bytes[start]:
            stop += 1
        height = num_bytes[start]
        is_valley = (start == 1 or num_bytes[start - 1] > height) and (
            stop + 1 == end or num_bytes[stop + 1] > height
        )
        plateau = [position for position in range(start, stop + 1) if is_allowed[position]]
        if height > 0 and is_valley and plateau:
            yield plateau
        start = stop + 1


def _common_depth(ops: Sequence[Op], position: int) -> int:
    """Length of the module path that the ops on both sides of a position share."""
    before, after = ops[position - 1].module.split("."), ops[position].module.split(".")
    differing = (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b)
    return next(differing, min(len(before), len(after)))


def _require_valid(graph: ModelGraph, starts: Sequence[int]) -> None:
    bounds = [*starts, len(graph.ops)]
    if bounds[0] != 0 or any(a >= b for a, b in pairwise(bounds)):
        raise PlanError(
            f"stages cannot start at ops {list(starts)}: the first starts at 0, and each has at least one of {len(graph.ops)} ops",
            hint=f"starts = {[0, *good_positions(graph)[: max(0, len(starts) - 1)]]}",
        )
    allowed = _allowed(graph)
    for start in starts:
        if not allowed[start]:
            op = graph.ops[start]
            others = (p for p in range(len(graph.ops)) if allowed[p])
            nearest = min(others, key=lambda position: (abs(position - start), -position))
            raise PlanError(
                f"a stage cannot start at op {op.name!r} ({op.module}): a tensor made before it is changed in place after it",
                hint=f"start at op {graph.ops[nearest].name!r}",
            )


def _members(graph: ModelGraph, start: int, stop: int, cheap: Sequence[bool]) -> list[int]:
    """Indices of the ops that a stage runs, in graph order: its own as far as they are needed here, and those that it repeats."""
    producer = graph.producer
    needed: set[int] = {i for i in range(start, stop) if not cheap[i] or graph.output in graph.ops[i].outputs}
    waiting = sorted(needed)
    while waiting:
        for name in graph.ops[waiting.pop()].inputs:
            maker = producer.get(name)
            if maker is not None and cheap[maker] and maker not in needed:
                needed.add(maker)
                waiting.append(maker)
    return sorted(needed)


def _edges(
    graph: ModelGraph, starts: Sequence[int], members: Sequence[Sequence[int]], cheap: Sequence[bool]
) -> tuple[Edge, ...]:
    """All travelling values, in the order in which they are made, then by target."""
    stage_of = {i: stage for stage, indices in enumerate(members) for i in indices if not cheap[i]}
    readers: dict[str, set[int]] = {}
    for stage, indices in enumerate(members):
        for index in indices:
            for name in graph.ops[index].inputs:
                readers.setdefault(name, set()).add(stage)
    return tuple(
        Edge(value=name, source=source, target=target, requires_grad=graph.values[name].requires_grad)
        for index, source in sorted(stage_of.items())
        for name in graph.ops[index].outputs
        if name is not None
        for target in sorted(readers.get(name, ()))
        if target != source
    )


def _segment(
    graph: ModelGraph,
    index: int,
    indices: Sequence[int],
    bounds: tuple[int, int],
    edges: Sequence[Edge],
    blocks: Sequence[Block],
) -> Segment:
    receives = tuple(edge for edge in edges if edge.target == index)
    ops = tuple(graph.ops[i] for i in indices)
    names = dict.fromkeys(name for op in ops for name in (*op.inputs, *op.outputs, *op.saved) if name)
    received = {edge.value for edge in receives}
    values = _stage_values(graph, ops, names, received)
    makes_output = graph.output in {name for op in ops for name in op.outputs}
    part = replace(
        graph,
        ops=ops,
        values=values,
        inputs=tuple(name for name in (*graph.inputs, *(e.value for e in receives)) if name in names),
        parameters=_used(graph.parameters, names),
        buffers=_used(graph.buffers, names),
        constants=tuple(constant for constant in graph.constants if constant.name in names),
        output=graph.output if makes_output else "",
    )
    return Segment(
        index=index,
        graph=part,
        receives=receives,
        sends=tuple(edge for edge in edges if edge.source == index),
        num_recomputed=sum(i < bounds[0] for i in indices),
        blocks=_stage_blocks(graph, part, indices, bounds, blocks),
    )


def _used(parameters: Sequence[Parameter], names: Mapping[str, None]) -> tuple[Parameter, ...]:
    return tuple(parameter for parameter in parameters if parameter.name in names)


def _stage_values(
    graph: ModelGraph, ops: Sequence[Op], names: Mapping[str, None], received: set[str]
) -> dict[str, Value]:
    """The values that a stage knows; what it receives has storage of its own, and views of that view it."""
    values = {
        name: replace(graph.values[name], kind="input", alias_of="")
        if name in received
        else graph.values[name]
        for name in names
    }
    for op in ops:
        for name in op.outputs:
            if name is not None and values[name].alias_of and values[name].alias_of not in values:
                owner = storage_owner(graph, name)
                viewed = next((i for i in op.inputs if storage_owner(graph, i) == owner), "")
                values[name] = replace(values[name], alias_of=viewed)
    return values


def _stage_blocks(
    graph: ModelGraph,
    part: ModelGraph,
    indices: Sequence[int],
    bounds: tuple[int, int],
    blocks: Sequence[Block],
) -> tuple[Block, ...]:
    """The stage's parts of the whole graph's blocks, by its own op numbers; what it computes again is a block of its own."""
    first = bisect_left(indices, bounds[0])
    found = [_block(part, 0, first, module="", is_layer=False)] if first else []
    for block in within(graph, blocks, *bounds):
        start, stop = bisect_left(indices, block.start), bisect_left(indices, block.stop)
        if stop - start == block.stop - block.start:
            found.append(replace(block, start=start, stop=stop))
        elif start < stop:
            found.append(_block(part, start, stop, module=block.module, is_layer=block.is_layer))
    return tuple(found)


def _block(part: ModelGraph, start: int, stop: int, *, module: str, is_layer: bool) -> Block:
    kind = fingerprint(part, start, stop)
    return Block(start=start, stop=stop, module=module, kind=kind, is_layer=is_layer)
