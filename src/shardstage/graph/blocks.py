"""``find_blocks``: the op list tiled by the modules that repeat: the unit of recompute, of FSDP and of ``torch.compile``.

    model.embed_tokens … | model.layers.0 | model.layers.1 | … | model.layers.79 | model.norm lm_head loss
    ─ surroundings ───── | ── layer ───── | ── layer ───── |   | ── layer ────── | ─ surroundings ──────

Layers are found by their paths alone, without a list of models: the members ``<path>.<number>`` of a list of modules. Of nested lists
the outermost counts whose members compute the same (a T5 block, not its sublayers; a Swin block, not its resolution).
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from shardstage.graph.flops import is_product
from shardstage.graph.model_graph import ModelGraph, Op, substitute

__all__ = ["Block", "find_blocks", "fingerprint", "fold", "within"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """The ops ``[start, stop)`` of a graph. Blocks of equal ``kind`` compute the same with other weights.

    ``is_layer``: worth recomputing as a whole; not so what lies around the layers, such as embedding, head and loss. In a model where
    nothing can be told apart every block is one.
    """

    start: int
    stop: int
    module: str
    kind: str
    is_layer: bool


def find_blocks(graph: ModelGraph) -> tuple[Block, ...]:
    """Blocks that tile all ops in order."""
    owners = _layer_of_each_op(graph) or _module_of_each_op(graph)
    runs = [part for run in _runs(owners) for part in _by_call(graph.ops, run)]
    runs = _with_leading_ops(graph, runs)
    has_layers = any(run.module for run in runs)
    return tuple(
        Block(
            start=run.start,
            stop=run.stop,
            module=run.module or _common_module(graph.ops[run.start : run.stop]),
            kind=fingerprint(graph, run.start, run.stop),
            is_layer=bool(run.module) or not has_layers,
        )
        for run in runs
    )


def within(graph: ModelGraph, blocks: Iterable[Block], start: int, stop: int) -> tuple[Block, ...]:
    """The parts of the blocks that lie in ops ``[start, stop)``; a block that is cut gets a kind of its own."""
    found = []
    for block in blocks:
        first, last = max(block.start, start), min(block.stop, stop)
        if (first, last) == (block.start, block.stop):
            found.append(block)
        elif first < last:
            found.append(replace(block, start=first, stop=last, kind=fingerprint(graph, first, last)))
    return tuple(found)


def fold(blocks: Iterable[Block]) -> tuple[tuple[str, int], ...]:
    """How many blocks there are of each kind, by first appearance."""
    counts: dict[str, int] = {}
    for block in blocks:
        counts[block.kind] = counts.get(block.kind, 0) + 1
    return tuple(counts.items())


def fingerprint(graph: ModelGraph, start: int, stop: int) -> str:
    """Equal for op sequences that differ in names only: the same calls on the same shapes, wired alike."""
    numbers: dict[str, int] = {}
    digest = hashlib.blake2b(digest_size=8)

    def describe(name: str) -> tuple[Any, ...]:
        if name in numbers:
            return (numbers[name],)
        numbers[name] = len(numbers)
        value = graph.values[name]
        kind = value.kind if value.kind in ("parameter", "buffer", "constant") else "value"
        return numbers[name], value.shape, value.dtype, kind, value.requires_grad

    for op in graph.ops[start:stop]:
        arguments = substitute((op.args, op.kwargs), lambda ref: describe(ref.name))
        outputs = [None if name is None else describe(name) for name in op.outputs]
        digest.update(repr((op.target, arguments, outputs)).encode())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class _Run:
    start: int
    stop: int
    module: str


def _layer_of_each_op(graph: ModelGraph) -> list[str]:
    """Path of the list member that each op belongs to, "" for the surroundings; empty if there is no such list."""
    members: dict[str, list[int]] = defaultdict(list)
    prefixes = {module: _numbered_prefixes(module) for module in {op.module for op in graph.ops}}
    for index, op in enumerate(graph.ops):
        for prefix in prefixes[op.module]:
            members[prefix].append(index)
    layers = {prefix for prefix, indices in members.items() if _is_composite(graph, indices)}
    repeating = _repeating(graph, {prefix: members[prefix] for prefix in layers})
    owner = {module: _outermost(module, repeating, layers) for module in {op.module for op in graph.ops}}
    owners = [owner[op.module] for op in graph.ops]
    return owners if any(owners) else []


def _numbered_prefixes(module: str) -> list[str]:
    """``a.0.b.1.c`` → ``a.0``, ``a.0.b.1``."""
    parts = module.split(".")
    return [".".join(parts[: i + 1]) for i, part in enumerate(parts) if part.isdigit()]


def _is_composite(graph: ModelGraph, indices: Sequence[int]) -> bool:
    """More than a plain leaf such as a linear module: a product with something around it."""
    return len(indices) > 2 and any(is_product(graph.ops[i]) for i in indices)


def _repeating(graph: ModelGraph, members: Mapping[str, Sequence[int]]) -> set[str]:
    """Members of those lists in which two members compute alike."""
    families: dict[str, list[str]] = defaultdict(list)
    for prefix in members:
        families[prefix.rpartition(".")[0]].append(prefix)
    found: set[str] = set()
    for siblings in families.values():
        contents = [_content(graph, members[prefix]) for prefix in siblings]
        distinct = set(contents)
        if len(distinct) < len(contents) or any(_is_alike(a, b) for a, b in combinations(distinct, 2)):
            found.update(siblings)
    return found


_Content = frozenset[tuple[tuple[Any, ...], int]]


def _content(graph: ModelGraph, indices: Sequence[int]) -> _Content:
    """How often which op makes which shapes; cheaper than a fingerprint, and blind to order and wiring."""
    return frozenset(
        Counter(
            (
                graph.ops[i].target,
                *(graph.values[name].shape for name in graph.ops[i].outputs if name is not None),
            )
            for i in indices
        ).items()
    )


def _is_alike(a: _Content, b: _Content) -> bool:
    """One is nearly a part of the other, as T5's later blocks are of its first, which also makes the position bias."""
    first, second = Counter(dict(a)), Counter(dict(b))
    return (first & second).total() >= 0.9 * min(first.total(), second.total())


def _outermost(module: str, repeating: set[str], layers: set[str]) -> str:
    prefixes = _numbered_prefixes(module)
    return next((p for p in prefixes if p in repeating), next((p for p in prefixes if p in layers), ""))


def _module_of_each_op(graph: ModelGraph) -> list[str]:
    """Without lists: modules that hold several products but no two such modules, as a U-Net's double convolutions do."""
    products: dict[str, int] = defaultdict(int)
    for op in graph.ops:
        if is_product(op):
            for prefix in _prefixes(op.module):
                products[prefix] += 1
    composite = {prefix for prefix, count in products.items() if prefix and count > 1}
    smallest = {p for p in composite if not any(other.startswith(f"{p}.") for other in composite)}
    holders = {p for p in composite if sum(f"{s}.".startswith(f"{p}.") for s in smallest) == 1}
    return [next((p for p in _prefixes(op.module) if p in holders), "") for op in graph.ops]


def _prefixes(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _runs(owners: Sequence[str]) -> list[_Run]:
    starts = [i for i, owner in enumerate(owners) if i == 0 or owner != owners[i - 1]]
    return [_Run(a, b, owners[a]) for a, b in zip(starts, [*starts[1:], len(owners)], strict=True)]


def _by_call(ops: Sequence[Op], run: _Run) -> list[_Run]:
    """One run per call of a module that is called several times in a row: its ops then repeat with a period."""
    if not run.module:
        return [run]
    period = _period([(op.module, op.target) for op in ops[run.start : run.stop]])
    if sum(map(is_product, ops[run.start : run.start + period])) < 2:
        return [run]
    return [_Run(start, start + period, run.module) for start in range(run.start, run.stop, period)]


def _period(items: Sequence[Any]) -> int:
    """Length of the shortest sequence that yields ``items`` when repeated a whole number of times (Knuth–Morris–Pratt)."""
    border = [0] * len(items)
    for i in range(1, len(items)):
        length = border[i - 1]
        while length and items[i] != items[length]:
            length = border[length - 1]
        border[i] = length + (items[i] == items[length])
    period = len(items) - border[-1]
    return period if len(items) % period == 0 else len(items)


def _with_leading_ops(graph: ModelGraph, runs: Sequence[_Run]) -> list[_Run]:
    """Joins a run between two layers to the second if it holds neither a product nor a parameter."""
    joined: list[_Run] = []
    pending: int | None = None
    for number, run in enumerate(runs):
        is_between = 0 < number < len(runs) - 1 and not run.module
        if is_between and not _is_heavy(graph, graph.ops[run.start : run.stop]):
            pending = run.start
            continue
        joined.append(run if pending is None else replace(run, start=pending))
        pending = None
    return joined


def _is_heavy(graph: ModelGraph, ops: Iterable[Op]) -> bool:
    return any(
        is_product(op) or any(graph.values[name].kind == "parameter" for name in op.inputs) for op in ops
    )


def _common_module(ops: Sequence[Op]) -> str:
    """The longest path that all ops lie under."""
    shared = ops[0].module.split(".")
    for op in ops:
        parts = op.module.split(".")
        same = [i for i, (a, b) in enumerate(zip(shared, parts, strict=False)) if a != b]
        shared = shared[: min([*same, len(parts)])]
    return ".".join(shared)
