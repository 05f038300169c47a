"""``Reading``: what the units of a local graph run, keep and send, at any microbatch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from itertools import pairwise
from typing import Final, NamedTuple

from shardstage.cluster import CollectiveKind
from shardstage.cost.collective import calls_of
from shardstage.cost.fusion import kernels_of
from shardstage.cost.kernels import Kernel, KernelReader, is_expert
from shardstage.graph import ModelGraph, Op
from shardstage.graph.attention import attention_operands, is_attention
from shardstage.graph.blocks import Block
from shardstage.graph.cuts import all_crossing_bytes
from shardstage.graph.flops import backward_flops, forward_flops
from shardstage.graph.recompute import Recompute
from shardstage.graph.saved import extra_values, is_of_batch, recomputed_ops, saved_values, working_sets
from shardstage.graph.saved_compiled import saved_compiled

__all__ = ["RECOMPUTES", "Bytes", "Reading", "Recompute", "Work", "fixed_values"]

RECOMPUTES: Final = ("none", "selective", "full")


class Bytes(NamedTuple):
    """Bytes at any microbatch."""

    fixed: float
    sample: float

    def at(self, microbatch: float) -> int:
        return round(self.fixed + self.sample * microbatch)


class Again(NamedTuple):
    """What named modules run again: forward kernels, and calls along tp."""

    kernels: tuple[Kernel, ...]
    calls: tuple[tuple[CollectiveKind, bool, Bytes], ...]


class Kept(NamedTuple):
    """What a recompute choice means for a unit; ``flops_ratio`` of its forward's FLOPs are computed again, in named modules ``again``."""

    saved: Bytes
    is_recomputed: bool
    flops_ratio: float
    extras: tuple[Bytes, ...]
    again: Again | None = None


class Attention(NamedTuple):
    """A fused attention: its keys and values, and these with its queries and its result."""

    keys: Bytes
    whole: Bytes
    num_heads: int


class Work(NamedTuple):
    """A kept unit at any microbatch; FLOPs are of one sample, ``dispatched`` are the tokens that its experts are given."""

    kernels: tuple[Kernel, ...]
    num_kernels: tuple[int, int]
    calls: tuple[tuple[CollectiveKind, bool, Bytes], ...]
    forward_flops: float
    backward_flops: float
    input_bytes: Bytes
    working_sets: tuple[Bytes, ...]
    own_elements: int
    num_parameters: int
    shared: tuple[str, ...]
    kept: dict[Recompute, Kept]
    expert_elements: int
    dispatched: Bytes
    attention: tuple[Attention, ...]


class Reading:
    """One local graph while its units are read: runs of ops (``bounds``); ``blocks`` tile it, ``modules`` are what selective means.

    ``keeping`` is the graph with what is kept where blocks are compiled.
    """

    def __init__(
        self,
        graph: ModelGraph,
        bounds: Sequence[tuple[int, int]],
        is_fixed: Callable[[str], bool],
        *,
        blocks: Sequence[Block],
        is_compiled: bool,
        modules: tuple[str, ...] = (),
    ) -> None:
        self.graph = graph
        self.keeping = saved_compiled(graph, blocks) if is_compiled else graph
        self.bounds = bounds
        self.is_compiled = is_compiled
        self.reader = KernelReader(graph, is_fixed, bounds=bounds)
        self.blocks = blocks
        self.modules = modules
        self.crossing = all_crossing_bytes(graph)

    def works(self, elements: dict[str, int], shared: frozenset[str], numbers: Iterable[int]) -> list[Work]:
        """Of some units, by their numbers."""
        saved = {recompute: self._increments(recompute) for recompute in RECOMPUTES}
        return [
            self._work(*self.bounds[number], elements, shared, {r: saved[r][number] for r in RECOMPUTES})
            for number in numbers
        ]

    def naming(self, modules: tuple[str, ...], works: Sequence[Work]) -> list[Work]:
        """``works`` where selective recomputation means these modules, which lie alike in layers that are alike."""
        named = copy(self)
        named.modules = modules
        return [
            work._replace(kept={**work.kept, "selective": named._kept(*bounds, "selective", saved, forward)})
            for work, bounds, saved, forward in zip(
                works,
                self.bounds,
                named._increments("selective"),
                (round(work.forward_flops * self.graph.microbatch) for work in works),
                strict=True,
            )
        ]

    def _work(
        self,
        start: int,
        stop: int,
        elements: dict[str, int],
        shared: frozenset[str],
        saved: dict[Recompute, Bytes],
    ) -> Work:
        graph = self.graph
        ops = graph.ops[start:stop]
        names = {name for op in ops for name in op.inputs if name in elements}
        forward = sum(forward_flops(graph, op) for op in ops)
        kernels = (*self._kernels(ops), *self.reader.received_sums(self.bounds.index((start, stop))))
        num_backward = sum(kernel.is_backward for kernel in kernels)
        return Work(
            kernels=kernels,
            num_kernels=(len(kernels) - num_backward, num_backward),
            calls=self._calls(ops),
            forward_flops=forward / graph.microbatch,
            backward_flops=sum(backward_flops(graph, op) for op in ops) / graph.microbatch,
            input_bytes=Bytes(0.0, self.crossing[start] / graph.microbatch),
            working_sets=_largest(self._bytes(names) for names in working_sets(graph, start, stop)),
            own_elements=sum(elements[name] for name in names - shared),
            num_parameters=len(names),
            shared=tuple(sorted(names & shared)),
            kept={r: self._kept(start, stop, r, saved[r], forward) for r in RECOMPUTES},
            expert_elements=sum(elements[name] for name in self._experts(ops) if name in elements),
            dispatched=self._bytes(op.inputs[0] for op in [op for op in ops if is_expert(op)][:1]),
            attention=tuple(self._attention(op) for op in ops if is_attention(op)),
        )

    def _calls(self, ops: Sequence[Op]) -> tuple[tuple[CollectiveKind, bool, Bytes], ...]:
        graph = self.graph
        return tuple(
            (call.kind, call.is_backward, Bytes(0.0, call.num_bytes / graph.microbatch))
            for op in ops
            for call in calls_of(graph, op)
        )

    def _experts(self, ops: Sequence[Op]) -> set[str]:
        """Parameters that hold an expert at each index: what grouped products multiply with, or a view of it."""
        values = self.graph.values
        found = set()
        for op in filter(is_expert, ops):
            name = op.inputs[1]
            while values[name].alias_of:
                name = values[name].alias_of
            found.add(name)
        return found

    def _attention(self, op: Op) -> Attention:
        query, key, value, _ = attention_operands(op)
        outputs = [name for name in op.outputs if name is not None]
        return Attention(
            keys=self._bytes((key, value)),
            whole=self._bytes((query, key, value, *outputs)),
            num_heads=self.graph.values[key].shape[-3],
        )

    def _kernels(self, ops: Sequence[Op]) -> tuple[Kernel, ...]:
        return kernels_of(self.graph, self.reader, ops, is_compiled=self.is_compiled)

    def _bytes(self, names: Iterable[str]) -> Bytes:
        return Bytes(*self.reader.moved(names))

    def _increments(self, recompute: Recompute) -> list[Bytes]:
        """Bytes that each unit adds to what those before it keep: a storage that two units keep counts with the first."""
        graph = self.graph
        up_to = [Bytes(0.0, 0.0)]
        for _, stop in self.bounds:
            names = saved_values(self.keeping, 0, stop, recompute, blocks=self.blocks, modules=self.modules)
            up_to.append(self._bytes(name for name in names if not is_of_batch(graph, name)))
        return [Bytes(b.fixed - a.fixed, b.sample - a.sample) for a, b in pairwise(up_to)]

    def _kept(self, start: int, stop: int, recompute: Recompute, saved: Bytes, forward: int) -> Kept:
        """Recomputing takes the share of the forward's time that its FLOPs are of the forward's, selective at least what is not product.

        In named modules it takes as long as their forward.
        """
        is_layer = any(block.is_layer and block.start < stop and start < block.stop for block in self.blocks)
        if recompute == "none" or not is_layer:
            return Kept(saved, False, 0.0, ())
        modules = self.modules if recompute == "selective" else ()
        again = [*recomputed_ops(self.graph, start, stop, recompute, blocks=self.blocks, modules=modules)]
        extras = extra_values(self.keeping, start, stop, recompute, blocks=self.blocks, modules=modules)
        flops = sum(forward_flops(self.graph, op) for op in again)
        return Kept(
            saved,
            True,
            flops / forward if forward else 1.0,
            _largest(self._bytes(names) for names in extras),
            self._again(again) if modules else None,
        )

    def _again(self, ops: Sequence[Op]) -> Again:
        return Again(
            tuple(kernel for kernel in self._kernels(ops) if not kernel.is_backward),
            tuple(call for call in self._calls(ops) if not call[1]),
        )


def _largest(sizes: Iterable[Bytes]) -> tuple[Bytes, ...]:
    """Those that are largest at some microbatch: none is at most another in both parts."""
    found: list[Bytes] = []
    for size in sorted(set(sizes), reverse=True):
        if not any(size.sample <= other.sample for other in found):
            found.append(size)
    return tuple(found)


def fixed_values(graph: ModelGraph) -> Callable[[str], bool]:
    """Whether a value of a graph at marker sizes, or of a local one made of it (``name@…``, ``name#…``), stays as the microbatch grows."""
    stored = ("parameter", "buffer", "constant")
    fixed = {
        name
        for name, value in graph.values.items()
        if value.kind in stored or (graph.is_scalable and value.numel % graph.microbatch)
    }

    def is_fixed(name: str) -> bool:
        return name in fixed or (name not in graph.values and re.split("[@#]", name)[0] in fixed)

    return is_fixed
