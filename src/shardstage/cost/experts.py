"""``with_whole_experts``: what a tensor-parallel rank runs where its experts are whole: the routed ops on its part of the tokens.

    cut     x ── all_gather ── router ── 1 / tp of each expert ── reduce_scatter ── y      all tokens
    whole   x ── router ── whole experts ── y                                              1 / tp of the tokens

Where x is not cut along the sequence, a rank takes its part of it and gathers the others' results (Liu et al., "MoE Parallel Folding",
2025, arXiv:2504.14960).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from operator import itemgetter

from shardstage.cost.kernels import is_expert
from shardstage.graph import ModelGraph, Op, Ref, Value, substitute
from shardstage.graph.attention import is_attention

__all__ = ["routed_ops", "with_whole_experts"]


def routed_ops(graph: ModelGraph) -> frozenset[str]:
    """Names of the ops between the tokens that an expert layer is given and the sum of what its experts make of them.

    The tokens are the last value that all ways to the experts' products pass through, their sum the first of as many elements that all ways
    from the router and the products pass through. A shared expert reads the one and is added to the other: it is not among them. Empty
    where a layer has no such values.
    """
    found: set[str] = set()
    for block in graph.blocks:
        ops = graph.ops[block.start : block.stop]
        experts = [(op.module, i) for i, op in enumerate(ops) if is_expert(op)]
        for _, layer in groupby(experts, key=itemgetter(0)):
            routed = _routed(graph, _Flow(graph, block.start, block.stop), [i for _, i in layer])
            if routed is None:
                return frozenset()
            found.update(ops[i].name for i in routed)
    return frozenset(found)


class _Flow:
    """What ops of a block read of each other, by their places in it; ``live`` ones depend on the batch.

    -1 stands for values from before the block, ``end`` for readers after it.
    """

    def __init__(self, graph: ModelGraph, start: int, stop: int) -> None:
        self.ops = graph.ops[start:stop]
        self.end = stop - start
        kept = ("activation", "input")
        self.made_by: list[set[int]] = []
        self.read_by: list[set[int]] = [set() for _ in self.ops]
        self.live: list[bool] = []
        for place, op in enumerate(self.ops):
            makers = {
                max(-1, graph.producer.get(n, -1) - start) for n in op.inputs if graph.values[n].kind in kept
            }
            self.made_by.append(makers)
            self.live.append(any(maker < 0 or self.live[maker] for maker in makers))
            for maker in makers - {-1}:
                self.read_by[maker].add(place)
            outside = (reader for n in op.outputs if n is not None for reader in graph.consumers[n])
            if any(reader >= stop for reader in outside):
                self.read_by[place].add(self.end)

    def before(self, places: Iterable[int]) -> set[int]:
        """All places that these depend on, themselves included."""
        return _closure(places, self.made_by, -1)

    def after(self, place: int) -> set[int]:
        return _closure([place], self.read_by, self.end)

    def makers(self, place: int) -> set[int]:
        """Live ones alone."""
        return {maker for maker in self.made_by[place] if maker < 0 or self.live[maker]}


def _closure(places: Iterable[int], edges: Sequence[set[int]], outside: int) -> set[int]:
    found: set[int] = set()
    left = list(places)
    while left:
        place = left.pop()
        if place not in found and place != outside:
            found.add(place)
            left.extend(edges[place])
    return found


def _routed(graph: ModelGraph, flow: _Flow, experts: Sequence[int]) -> set[int] | None:
    """Places of a layer's ops from its tokens to its experts' sum: no op of the block reads what others than the last make."""
    first = _entrance(flow, experts[0])
    if first is None:
        return None
    upto, numel = flow.before([first]), _numel(graph, flow.ops[first])
    for place in sorted(flow.after(experts[-1])):
        if _numel(graph, flow.ops[place]) == numel:
            last = _reshaped(graph, flow, place)
            routed = _between(flow, upto, flow.after(first), last)
            if all(flow.read_by[place] <= routed | {flow.end} for place in routed - {last}):
                return None if any(is_attention(flow.ops[place]) for place in routed) else routed
    return None


def _reshaped(graph: ModelGraph, flow: _Flow, place: int) -> int:
    """The last of the ops that only give the result of one another shape or dtype."""
    numel = _numel(graph, flow.ops[place])
    while len(flow.read_by[place]) == 1:
        (reader,) = flow.read_by[place]
        is_reshaped = reader < flow.end and len(flow.ops[reader].inputs) == 1
        if not is_reshaped or _numel(graph, flow.ops[reader]) != numel:
            break
        place = reader
    return place


def _between(flow: _Flow, upto: set[int], descending: set[int], last: int) -> set[int]:
    """What a place depends on of what descends from the entrance, and what was made for that alone without the batch."""
    routed = flow.before([last]) - upto
    for place in sorted(routed, reverse=True):
        is_made_for_them = not flow.live[place] and flow.read_by[place] <= routed
        if place not in descending and not is_made_for_them:
            routed.discard(place)
    return routed


def _entrance(flow: _Flow, expert: int) -> int | None:
    """The last op before a place through which all live ways to it lead."""
    ways = sorted(place for place in flow.before([expert]) if flow.live[place])
    earliest = flow.end  # of what the places after this one read
    for place, later in zip(reversed(ways[:-1]), reversed(ways), strict=False):
        earliest = min(earliest, *flow.makers(later))
        if earliest >= place:
            return place
    return None


def _numel(graph: ModelGraph, op: Op) -> int:
    return next((graph.values[name].numel for name in op.outputs if name is not None), 0)


def with_whole_experts(local: ModelGraph, part: ModelGraph, routed: frozenset[str]) -> ModelGraph:
    """The local graph of a rank that computes its routed ops whole, as ``part`` has them: of 1 / tp of the tokens, not sharded."""
    written = _Written(local, part, routed)
    for op in local.ops:
        name = op.name.split("@")[0]
        if name not in routed:
            written.ops.append(op)
        elif op.name == name:
            written.ops += written.whole(part.ops[part.producer[_output(op, part)]])
        elif written.serves_others(op):
            written.ops.append(op)
    return replace(local, ops=tuple(written.ops), values=written.values)


def _output(op: Op, part: ModelGraph) -> str:
    """A name that the op's output has in the unsharded graph, too."""
    return next(
        n for name in op.outputs if name is not None for n in [name.split("@")[0]] if n in part.values
    )


class _Written:
    """Ops and values of the new graph as they are written."""

    def __init__(self, local: ModelGraph, part: ModelGraph, routed: frozenset[str]) -> None:
        self.local = local
        self.part = part
        self.ops: list[Op] = []
        self.values: dict[str, Value] = dict(local.values)
        self._routed = routed
        self._taken: set[str] = set()
        self._made = {name for op in part.ops if op.name in routed for name in op.outputs if name is not None}

    def serves_others(self, op: Op) -> bool:
        """Whether what was inserted for a routed op is read by another, too."""
        readers = (
            self.local.ops[i].name.split("@")[0] for n in op.outputs if n for i in self.local.consumers[n]
        )
        return not self._made.intersection(op.outputs) and any(name not in self._routed for name in readers)

    def whole(self, op: Op) -> Iterator[Op]:
        """A routed op with what takes a rank's part of its inputs and gathers its result where others read all of it."""
        for name in op.inputs:
            value = self.part.values[name]
            if name in self._made:
                continue
            if value.kind not in ("activation", "input"):
                self.values[name] = value
            elif value.shape != self.local.values[name].shape and name not in self._taken:
                self._taken.add(name)
                yield self._talk(op, "slice", name, f"{name}@part", value.shape)
        renamed = {name: f"{name}@part" for name in (*op.inputs, *op.saved) if name in self._taken}
        for made in (*op.outputs, *op.saved):
            if made is not None and (made in self._made or self.part.values[made].kind == "saved"):
                self.values[made] = self.part.values[made]
        gathered = [name for name in op.outputs if name is not None and self._is_read_whole(name)]
        renamed |= {name: f"{name}@part" for name in gathered}
        yield _renamed(op, renamed)
        for name in gathered:
            shape = self.local.values[name].shape
            self.values[f"{name}@part"] = replace(self.values[name], name=f"{name}@part")
            yield self._talk(op, "gather_whole", f"{name}@part", name, shape)

    def _is_read_whole(self, name: str) -> bool:
        """Whether ops that are not routed read a value, and all of it."""
        readers = (self.part.ops[i].name for i in self.part.consumers[name])
        is_cut = self.part.values[name].shape != self.local.values[name].shape
        return is_cut and any(reader not in self._routed for reader in readers)

    def _talk(self, op: Op, kind: str, source: str, made: str, shape: tuple[int, ...]) -> Op:
        alias_of = (self.values[source].alias_of or source) if kind == "slice" else ""
        self.values[made] = replace(
            self.values[source], name=made, kind="activation", shape=shape, alias_of=alias_of
        )
        return Op(
            name=f"{op.name}@{kind}",
            target=f"shardstage.{kind}",
            args=(Ref(source),),
            outputs=(made,),
            module=op.module,
            module_type=op.module_type,
            source=op.source,
        )


def _renamed(op: Op, names: dict[str, str]) -> Op:
    """The op with other names for what it reads, writes and saves."""
    if not names:
        return op

    def named(ref: Ref) -> Ref:
        return Ref(names.get(ref.name, ref.name))

    return replace(
        op,
        args=substitute(op.args, named),
        kwargs=tuple((key, substitute(value, named)) for key, value in op.kwargs),
        outputs=tuple(name and names.get(name, name) for name in op.outputs),
        saved=tuple(names.get(name, name) for name in op.saved),
    )
