"""``shard``: from a graph and a number of ranks to the placement of every value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from shardstage.graph import ModelGraph, Op
from shardstage.layout import Placement, Shard
from shardstage.sharding.cuts import Cuts
from shardstage.sharding.pull import pull_back
from shardstage.sharding.rules import RULES
from shardstage.sharding.sharding import Conversion, Sharding, Unsharded
from shardstage.sharding.state import SUMMED, WHOLE, Placing, State
from shardstage.sharding.walk import Free, Walk

__all__ = ["shard"]

_HEAVY = ("conv", "lstm", "gru", "rnn", "linear", "mm", "bmm", "matmul", "attention", "embedding")
"""Parts of the names of ops whose work is worth a line when it is not shared."""


def shard(
    graph: ModelGraph,
    *,
    num_ranks: int,
    is_sequence_parallel: bool = False,
    replicate: Sequence[str] = (),
) -> Sharding:
    """Where each value lies on ``num_ranks`` tensor-parallel ranks.

    ``replicate`` are globs over parameter names (ties included) that must stay whole. The choice depends on the model alone, never on
    the sizes of microbatch and sequence. With one rank everything is whole.
    """
    cuts = Cuts(num_ranks)
    for parameter in graph.parameters:
        names = (parameter.fqn, *parameter.ties)
        found = next((g for g in replicate for name in names if fnmatchcase(name, g)), None)
        if num_ranks == 1 or found is not None:
            cuts.keep_whole(parameter.name, "one rank" if found is None else f"replicate = {found!r}")
    walk = Walk(graph, cuts, is_sequence_parallel=is_sequence_parallel and num_ranks > 1)
    walk.run()
    pulled = pull_back(graph, walk.placings, walk.free)
    placings, free = _settle(graph, pulled, walk.free)
    placements = dict.fromkeys(graph.values, WHOLE) | free
    for op, placing in zip(graph.ops, placings, strict=True):
        results = zip(op.outputs, placing.results, strict=False)
        placements.update({name: state.placement for name, state in results if name is not None})
    return Sharding(
        graph=graph,
        num_ranks=num_ranks,
        is_sequence_parallel=is_sequence_parallel,
        placements=placements,
        placings={op.name: placing for op, placing in zip(graph.ops, placings, strict=True)},
        conversions=tuple(_conversions(graph, placings, placements)),
        parameters={p.fqn: placements[p.name] for p in graph.parameters},
        unsharded=tuple(_unsharded(graph, walk, placings)) if num_ranks > 1 else (),
    )


def _settle(
    graph: ModelGraph, placings: Sequence[Placing], free: Mapping[str, Free]
) -> tuple[list[Placing], dict[str, Placement]]:
    """The one placement that all uses of a parameter ask for; whole where they differ, and then converted for each use.

    From the last op to the first, so that a transpose passes on what is asked of it.
    """
    settled = list(placings)
    asked: dict[str, set[Placement]] = {}
    for index in reversed(range(len(graph.ops))):
        op = graph.ops[index]
        output = op.outputs[0] if op.outputs else None
        if output is not None and output in free:
            settled[index] = _passed_on(op.inputs[0], output, free, asked.get(output, set()))
        for name, placement in settled[index].inputs.items():
            if name in free:
                is_whole = placement == SUMMED and not graph.values[name].requires_grad
                asked.setdefault(name, set()).add(WHOLE if is_whole else placement)
    parameters = [p.name for p in graph.parameters]
    return settled, {name: _only(asked.get(name, set())) for name in parameters}


def _passed_on(source: str, output: str, free: Mapping[str, Free], asked: set[Placement]) -> Placing:
    placement = _only(asked)
    below: Placement = placement
    if isinstance(placement, Shard):
        below = placement.with_dim(free[source][1].index(free[output][1][placement.dim]))
    return Placing(inputs={source: below}, outputs=(State(placement),))


def _only(asked: set[Placement]) -> Placement:
    return next(iter(asked)) if len(asked) == 1 else WHOLE


def _conversions(
    graph: ModelGraph, placings: Sequence[Placing], placements: Mapping[str, Placement]
) -> Iterator[Conversion]:
    """What must move so that every op finds its inputs as it needs them; each value once to each placement."""
    made: set[tuple[str, Placement]] = set()
    for op, placing in zip(graph.ops, placings, strict=True):
        for name in op.inputs:
            if name not in placing.inputs:
                continue
            needed = needed_placement(graph, name, placing.inputs[name])
            source = placements[name]
            if needed == source:
                continue
            steps = [(source, needed)]
            if isinstance(source, Shard) and isinstance(needed, Shard):
                steps = [(source, WHOLE), (WHOLE, needed)]
            for before, after in steps:
                if (name, after) not in made:
                    made.add((name, after))
                    yield Conversion(value=name, source=before, target=after, anchor=op.name)


def needed_placement(graph: ModelGraph, name: str, placement: Placement) -> Placement:
    """Without a gradient the two kinds of whole are one."""
    return WHOLE if placement == SUMMED and not graph.values[name].requires_grad else placement


def _unsharded(graph: ModelGraph, walk: Walk, placings: Sequence[Placing]) -> Iterator[Unsharded]:
    parameters = {p.name for p in graph.parameters}
    for index, (op, placing) in enumerate(zip(graph.ops, placings, strict=True)):
        is_shared = any(isinstance(s.placement, Shard) for s in placing.results) or placing.form != ""
        is_partial = any(isinstance(p, Shard) for p in placing.inputs.values())
        if is_shared or is_partial:
            continue
        reason = _reason(op, walk, index, parameters)
        if reason:
            yield Unsharded(op=op.name, source=op.source, reason=reason)


def _reason(op: Op, walk: Walk, index: int, parameters: set[str]) -> str:
    """Why an op with weights or heavy work runs whole; "" for an op that has neither."""
    weights = [walk.free[name][0] for name in op.inputs if name in walk.free]
    is_heavy = any(word in op.target.split(".")[1] for word in _HEAVY)
    for name in weights:
        if is_heavy and name in walk.cuts.whole:
            return walk.cuts.whole[name]
    if index in walk.gathered:
        return walk.gathered[index]
    if op.target not in RULES and (weights or is_heavy):
        return f"no rule for {op.target}"
    return "its inputs are whole" if is_heavy and not weights else ""
