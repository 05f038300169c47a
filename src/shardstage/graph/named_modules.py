"""``recompute_parts``: what each part of a stage computes again; with modules named, "selective" means the ops in these alone.

    ops of a layer     norm  attention  add  norm  mlp  add
    modules *norm/*.mlp ━━━━                 ━━━━━━━━━            computed again, each run from the inputs that were made outside of it
                              ─────────  ───            ───        as with none

A glob names a module, and so all that lies in it, by its path from the model down (``model.layers.0.mlp``); ``*`` stands for dots, too. A
run is as long as matching ops follow one another, whichever of the modules they lie in, up to the last one that saves what the run has
made: without such an op nothing is gained. Ops that change a tensor in place are computed again only together with its making: never the
statistics of a normalisation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import translate
from itertools import groupby
from typing import NamedTuple

from shardstage.graph.blocks import Block
from shardstage.graph.model_graph import ModelGraph, Op
from shardstage.graph.mutation import mutated, storage_owner
from shardstage.graph.recompute import Recompute, StageRecompute, block_modes

__all__ = ["Part", "modules_of_layers", "recompute_parts"]


class Part(NamedTuple):
    """The ops ``start <= i < stop``; ``is_named``: a run of ops in modules that were named."""

    start: int
    stop: int
    mode: Recompute
    is_named: bool = False


def recompute_parts(
    graph: ModelGraph, blocks: Sequence[Block], recompute: StageRecompute, modules: Sequence[str] = ()
) -> tuple[tuple[Part, ...], ...]:
    """The parts that tile each block of a stage. Where ``modules`` are named, a selective layer is cut into runs in full and the rest."""
    modes = block_modes(recompute, blocks)
    if not modules or "selective" not in modes:
        return tuple(
            (Part(block.start, block.stop, mode),) for block, mode in zip(blocks, modes, strict=True)
        )
    pattern, changes = re.compile("|".join(map(translate, modules))), _changes(graph)
    return tuple(
        tuple(_parts_of(block, _named_runs(graph, block, pattern, changes)))
        if mode == "selective"
        else (Part(block.start, block.stop, mode),)
        for block, mode in zip(blocks, modes, strict=True)
    )


def modules_of_layers(graph: ModelGraph) -> tuple[str, ...]:
    """Paths of all modules that a layer is or holds, in graph order."""
    paths = (
        path
        for block in graph.blocks
        if block.is_layer
        for op in graph.ops[block.start : block.stop]
        for path in _paths_within(op.module, block)
    )
    return tuple(dict.fromkeys(paths))


def _parts_of(block: Block, runs: Iterable[tuple[int, int]]) -> Iterator[Part]:
    at = block.start
    for start, stop in runs:
        if at < start:
            yield Part(at, start, "none")
        yield Part(start, stop, "full", is_named=True)
        at = stop
    if at < block.stop:
        yield Part(at, block.stop, "none")


def _named_runs(
    graph: ModelGraph, block: Block, pattern: re.Pattern[str], changes: Mapping[str, Sequence[int]]
) -> Iterator[tuple[int, int]]:
    """Where runs of ops in matching modules begin and end, in order; the last op of each saves something that the run makes."""
    ops = graph.ops[block.start : block.stop]
    is_matching = {
        module: any(pattern.match(path) for path in _paths_within(module, block))
        for module in {op.module for op in ops}
    }
    again = [is_matching[op.module] for op in ops]
    if changes:
        _leave_changed(graph, block, again, changes)
    for start, stop in _runs(again, block.start):
        made = {name for op in graph.ops[start:stop] for name in op.outputs}
        given = {name for op in graph.ops[start:stop] for name in op.inputs if name not in made}
        saving = [index for index in range(start, stop) if not given.issuperset(graph.ops[index].saved)]
        if saving:
            yield start, saving[-1] + 1


def _paths_within(module: str, block: Block) -> Iterator[str]:
    """The module's path and those of the modules around it, up to the layer itself; none for what lies outside of the layer."""
    if block.module and not f"{module}.".startswith(f"{block.module}."):
        return
    names = module.split(".") if module else []
    depth = block.module.count(".") + 1
    yield from (".".join(names[:length]) for length in range(depth, len(names) + 1))


def _runs(again: Sequence[bool], offset: int) -> Iterator[tuple[int, int]]:
    at = offset
    for is_again, same in groupby(again):
        start, at = at, at + len([*same])
        if is_again:
            yield start, at


def _changes(graph: ModelGraph) -> dict[str, list[int]]:
    """Which ops change each storage in place."""
    changes: dict[str, list[int]] = {}
    for index, op in enumerate(graph.ops):
        for name in mutated(op):
            changes.setdefault(storage_owner(graph, name).name, []).append(index)
    return changes


def _leave_changed(
    graph: ModelGraph, block: Block, again: list[bool], changes: Mapping[str, Sequence[int]]
) -> None:
    """Strikes out ops that touch a storage that is changed in place, unless its making and all its changes lie in the same run."""
    is_stable = False
    while not is_stable:
        is_stable = True
        for start, stop in [*_runs(again, block.start)]:
            for index in range(start, stop):
                if not _is_within(graph, graph.ops[index], range(start, stop), changes):
                    again[index - block.start] = is_stable = False


def _is_within(graph: ModelGraph, op: Op, run: range, changes: Mapping[str, Sequence[int]]) -> bool:
    names = (*op.inputs, *(name for name in op.outputs if name is not None))
    owners = {storage_owner(graph, name).name for name in names}
    return all(
        graph.producer.get(owner, -1) in run and all(index in run for index in changes[owner])
        for owner in owners & changes.keys()
    )
