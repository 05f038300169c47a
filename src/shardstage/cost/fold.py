"""``fold``: a model's repeated blocks kept twice instead of eighty times, so that everything about it is priced in milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from shardstage.cost.experts import routed_ops
from shardstage.graph import ModelGraph, Op, Ref, substitute
from shardstage.graph.blocks import Block, fingerprint
from shardstage.graph.named_modules import recompute_parts

__all__ = ["Folded", "Unit", "by_op", "fold"]

MAX_PERIOD = 4
"""Longest pattern of blocks that is looked for: Gemma alternates two kinds of layer, Llama 4 and Jamba up to four and eight."""

KEPT_REPEATS = 2
"""Twice, so that blocks are still seen to repeat, and the second shows what a block in mid-model shares with its neighbour."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """Consecutive ops ``start <= i < stop`` of the whole graph that no stage cuts through; ``twin`` is the kept unit that it equals.

    ``layer`` numbers the layer that it is, or is a part of; -1 outside of layers.
    """

    start: int
    stop: int
    module: str
    kind: str
    twin: int
    layer: int = -1


@dataclass(frozen=True, kw_only=True)
class Folded:
    """``graph`` computes the kept units only; ``units`` tile the whole graph, ``kept`` tile ``graph`` (``twin`` is an index of it).

    ``modules`` are those that selective recomputation means; without any it means what it always does.
    """

    graph: ModelGraph
    units: tuple[Unit, ...]
    kept: tuple[tuple[int, int], ...]
    modules: tuple[str, ...] = ()

    @property
    def layers(self) -> tuple[int, ...]:
        """The layer of each unit."""
        return tuple(unit.layer for unit in self.units)

    @property
    def starts(self) -> tuple[int, ...]:
        """The op of the whole graph that each unit begins at."""
        return tuple(unit.start for unit in self.units)

    def at(self, microbatch: int, sequence: int | None) -> ModelGraph:
        """The kept units at such sizes; made once, as it is asked for by every sharding."""
        if (microbatch, sequence) not in self._sized:
            self._sized[microbatch, sequence] = self.graph.at(microbatch=microbatch, sequence=sequence)
        return self._sized[microbatch, sequence]

    @cached_property
    def _sized(self) -> dict[tuple[int, int | None], ModelGraph]:
        return {}

    @cached_property
    def routed(self) -> frozenset[str]:
        """Names of the kept ops between the tokens of expert layers and their experts' sums (``routed_ops``)."""
        return routed_ops(self.graph)

    @property
    def can_have_whole_experts(self) -> bool:
        """Whether the tokens of all expert layers can be dealt out over tensor-parallel ranks."""
        return self.graph.is_scalable and self.graph.is_sequence_scalable and bool(self.routed)

    def unit_at(self, position: int) -> int:
        """Index of the unit that begins at op ``position`` of the whole graph."""
        return next(index for index, unit in enumerate(self.units) if unit.start == position)


def fold(graph: ModelGraph, *, boundaries: Sequence[int] = (), modules: Sequence[str] = ()) -> Folded:
    """The graph with runs of equal blocks cut down to two of them; ``boundaries`` are op positions where a unit must begin.

        embed | layer layer layer layer … layer | head        units, twins 0 1 2 2 2 … 2 3
        embed | layer layer                     | head        graph

    A unit's op k stands for op k of every unit with the same twin. Blocks of which other ops lie in ``modules`` are not equal.
    """
    whole = _units(graph, boundaries, modules)
    twins = _twins(whole)
    order = sorted(set(twins))
    units = tuple(replace(unit, twin=order.index(twin)) for unit, twin in zip(whole, twins, strict=True))
    renamed = _renaming(graph, whole, twins)
    ops = tuple(
        _rename(op, renamed) for index in order for op in graph.ops[whole[index].start : whole[index].stop]
    )
    kept, position = [], 0
    for index in order:
        size = whole[index].stop - whole[index].start
        kept.append((position, position + size))
        position += size
    return Folded(graph=_with_ops(graph, ops, renamed), units=units, kept=tuple(kept), modules=tuple(modules))


def by_op(folded: Folded) -> Folded:
    """The same graph with a unit for every op, so that each is priced by itself; of equal blocks only those kept are read."""
    return replace(
        folded,
        units=tuple(
            replace(unit, start=unit.start + k, stop=unit.start + k + 1, twin=folded.kept[unit.twin][0] + k)
            for unit in folded.units
            for k in range(unit.stop - unit.start)
        ),
        kept=tuple((index, index + 1) for index in range(len(folded.graph.ops))),
    )


def _units(graph: ModelGraph, boundaries: Sequence[int], modules: Sequence[str]) -> tuple[Unit, ...]:
    """Blocks, cut further at the boundaries; the parts of a cut block have kinds of their own."""
    units = []
    for number, block in enumerate(_told_apart(graph, modules)):
        inner = [at for at in sorted(set(boundaries)) if block.start < at < block.stop]
        for start, stop in pairwise((block.start, *inner, block.stop)):
            kind = block.kind
            if inner:
                kind = fingerprint(graph, start, stop) + (f" of {block.kind}" if modules else "")
            layer = number if block.is_layer else -1
            units.append(Unit(start=start, stop=stop, module=block.module, kind=kind, twin=-1, layer=layer))
    return tuple(units)


def _told_apart(graph: ModelGraph, modules: Sequence[str]) -> tuple[Block, ...]:
    """The graph's blocks, with the places of their runs in the modules as part of their kinds."""
    if not modules:
        return graph.blocks
    parts = recompute_parts(graph, graph.blocks, "selective", modules)
    runs = (
        [(part.start - block.start, part.stop - block.start) for part in of_block if part.is_named]
        for block, of_block in zip(graph.blocks, parts, strict=True)
    )
    return tuple(
        replace(block, kind=f"{block.kind} {own}") if own else block
        for block, own in zip(graph.blocks, runs, strict=True)
    )


def _twins(units: Sequence[Unit]) -> list[int]:
    """For each unit the index of the one that is kept for it: itself, or the one at its place in its run's second period."""
    twins = list(range(len(units)))
    at = 0
    while at < len(units):
        period, repeats = max(
            ((p, _num_repeats(units, at, p)) for p in range(1, MAX_PERIOD + 1)),
            key=lambda found: (found[0] * (found[1] - KEPT_REPEATS), -found[0]),
        )
        if repeats <= KEPT_REPEATS:
            at += 1
            continue
        last_kept = at + (KEPT_REPEATS - 1) * period
        for index in range(last_kept + period, at + repeats * period):
            twins[index] = last_kept + (index - at) % period
        at += repeats * period
    return twins


def _num_repeats(units: Sequence[Unit], at: int, period: int) -> int:
    kinds = [unit.kind for unit in units[at:]]
    repeats = 1
    while kinds[repeats * period : (repeats + 1) * period] == kinds[:period]:
        repeats += 1
    return repeats


def _renaming(graph: ModelGraph, units: Sequence[Unit], twins: Sequence[int]) -> dict[str, str]:
    """From each value that a dropped unit makes to its twin's."""
    renamed = {}
    for unit, twin in zip(units, twins, strict=True):
        if units[twin] is unit:
            continue
        for gone, stays in zip(
            graph.ops[unit.start : unit.stop],
            graph.ops[units[twin].start : units[twin].stop],
            strict=True,
        ):
            for a, b in zip(gone.outputs, stays.outputs, strict=True):
                if a is not None and b is not None:
                    renamed[a] = b
    return renamed


def _rename(op: Op, renamed: dict[str, str]) -> Op:
    if not any(name in renamed for name in (*op.inputs, *op.saved)):
        return op

    def fix(ref: Ref) -> Ref:
        return Ref(renamed.get(ref.name, ref.name))

    return replace(
        op,
        args=tuple(substitute(argument, fix) for argument in op.args),
        kwargs=tuple((key, substitute(argument, fix)) for key, argument in op.kwargs),
        saved=tuple(renamed.get(name, name) for name in op.saved),
    )


def _with_ops(graph: ModelGraph, ops: tuple[Op, ...], renamed: dict[str, str]) -> ModelGraph:
    """The graph of fewer ops, without the parameters, buffers and values that only dropped ops used."""
    used = {name for op in ops for name in (*op.inputs, *op.outputs, *op.saved) if name is not None}
    used |= {graph.values[name].alias_of for name in used} - {""}
    values = {
        name: replace(value, alias_of=renamed.get(value.alias_of, value.alias_of))
        for name, value in graph.values.items()
        if name in used or name in graph.inputs
    }
    values |= {
        v.alias_of: graph.values[v.alias_of]
        for v in list(values.values())
        if v.alias_of and v.alias_of not in values
    }
    return replace(
        graph,
        ops=ops,
        values=values,
        parameters=tuple(p for p in graph.parameters if p.name in used),
        buffers=tuple(b for b in graph.buffers if b.name in used),
        constants=tuple(c for c in graph.constants if c.name in used),
        output=renamed.get(graph.output, graph.output),
    )
