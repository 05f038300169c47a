"""Ops that take pieces of a tensor or put some together: slice, split, select, cat."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

from shardstage.graph import Op
from shardstage.layout import Shard
from shardstage.sharding.call import Call, LocalCall, argument_of, with_arguments
from shardstage.sharding.rules.pointwise import boundaries
from shardstage.sharding.state import Blocked, Origin, Placing, Refine, State

__all__ = [
    "place_cat",
    "place_select",
    "place_slice",
    "place_split",
    "place_unbind",
    "rewrite_slice",
    "rewrite_split",
]

_MOST_SECTIONS = 8
"""A dim of more elements than this is no list of fused weights."""


def place_slice(call: Call) -> Placing:
    """``slice(x, dim, start, end, step)``; of a sharded dim, whole sections only."""
    name = call.tensors[0]
    shard = call.shard(name)
    if shard is None:
        return call.all_whole()
    dim, start, stop, step = _slice_bounds(call.op, call.shape(name))
    state = call.state(name)
    if dim != shard.dim:
        return Placing(inputs={name: shard}, outputs=(state,))
    if step != 1:
        raise Blocked((name,), "a sharded dim is taken in steps")
    return Placing(inputs={name: shard}, outputs=(_taken(name, state, start, stop),))


def rewrite_slice(call: LocalCall) -> tuple[Op, ...]:
    name = call.whole_name(0, "self")
    assert name is not None
    given = call.given(name)
    dim, start, stop, _ = _slice_bounds(call.whole_op, call.shape(name))
    if not isinstance(given, Shard) or given.dim != dim:
        return (call.op,)
    local_start, local_stop = (_held_before(given, at, call.rank) for at in (start, stop))
    return (with_arguments(call.op, call.op.args[0], dim, local_start, local_stop),)


def place_split(call: Call) -> Placing:
    """``split(x, size, dim)``, ``split_with_sizes(x, sizes, dim)``, ``chunk(x, n, dim)``; a sharded dim is first cut in such sections."""
    name = call.tensors[0]
    shard = call.shard(name)
    dim = call.argument(2, "dim", 0) % len(call.shape(name))
    if shard is None:
        return call.all_whole()
    if dim != shard.dim:
        return Placing(inputs={name: shard}, outputs=(call.state(name),) * len(call.op.outputs))
    stops = list(accumulate(_piece_sizes(call.op, shard.length)))
    state = call.state(name)
    bounds = zip([0, *stops], stops, strict=False)
    missing = tuple(stop for stop in stops if stop not in boundaries(shard))
    if missing:
        raise Refine(name, f"{call.op.target} cuts between {missing}", boundaries=tuple(stops))
    return Placing(
        inputs={name: shard}, outputs=tuple(_taken(name, state, start, stop) for start, stop in bounds)
    )


def rewrite_split(call: LocalCall) -> tuple[Op, ...]:
    name = call.whole_name(0, "self")
    assert name is not None
    given = call.given(name)
    dim = call.argument(2, "dim", 0) % len(call.shape(name))
    if not isinstance(given, Shard) or given.dim != dim:
        return (call.op,)
    sizes = tuple(
        state.placement.size(call.rank)
        for state in call.placing.outputs
        if isinstance(state.placement, Shard)
    )
    return (with_arguments(call.op, call.op.args[0], sizes, dim, target="aten.split_with_sizes.default"),)


def place_select(call: Call) -> Placing:
    """``select(x, dim, index)`` of a dim that is whole."""
    name = call.tensors[0]
    return _without_dim(call, name, call.argument(1, "dim") % len(call.shape(name)))


def place_unbind(call: Call) -> Placing:
    """``unbind(x, dim)`` of a dim that is whole."""
    name = call.tensors[0]
    return _without_dim(call, name, call.argument(1, "dim", 0) % len(call.shape(name)))


def place_cat(call: Call) -> Placing:
    """``cat(tensors, dim)`` of tensors that are cut alike along another dim."""
    shards = {call.shard(name) for name in call.tensors}
    if shards == {None}:
        return call.all_whole()
    dim = call.argument(1, "dim", 0) % len(call.output_shape)
    chosen = next(shard for shard in shards if shard is not None)
    if shards - {None} != {chosen} or chosen.dim == dim:
        raise Blocked(call.sharded, "tensors are joined along the sharded dim, or are cut differently")
    origins = dict.fromkeys(origin for name in call.sharded for origin in call.state(name).origins)
    return Placing(inputs=dict.fromkeys(call.tensors, chosen), outputs=(State(chosen, tuple(origins)),))


def _without_dim(call: Call, name: str, dim: int) -> Placing:
    shard = call.shard(name)
    if shard is None:
        return call.all_whole()
    if shard.dim == dim:
        reason = f"{call.op.target} takes single elements of the sharded dim"
        if shard.length > _MOST_SECTIONS:
            raise Blocked((name,), reason)
        raise Refine(name, reason, boundaries=tuple(range(1, shard.length + 1)))
    state = State(shard.with_dim(shard.dim - (shard.dim > dim)), call.state(name).origins)
    return Placing(inputs={name: shard}, outputs=(state,) * len(call.op.outputs))


def _taken(name: str, state: State, start: int, stop: int) -> State:
    """The state of elements ``start`` to ``stop`` of the sharded dim."""
    shard = state.shard
    assert shard is not None
    if (start, stop) == (0, shard.length):
        return state
    ends = (0, *boundaries(shard))
    if start not in ends or stop not in ends:
        wanted = tuple(sorted({start, stop, shard.length} - {0}))
        raise Refine(name, f"elements {start} to {stop} of the sharded dim are taken", boundaries=wanted)
    first, last = ends.index(start), ends.index(stop)
    taken = Shard(dim=shard.dim, sections=shard.sections[first:last])
    return State(taken, tuple(_narrowed(o, len(shard.sections), first, last) for o in state.origins))


def _narrowed(origin: Origin, num_sections: int, first: int, last: int) -> Origin:
    if origin.last - origin.first != num_sections:
        return origin
    return replace(origin, first=origin.first + first, last=origin.first + last)


def _held_before(shard: Shard, position: int, rank: int) -> int:
    """Elements before ``position`` of the whole dim that the rank holds."""
    return sum(
        max(0, min(stop, position) - start) for start, stop in shard.intervals(rank) if start < position
    )


def _slice_bounds(op: Op, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """(dim, start, stop, step) with the shorthands written out."""
    dim, start, stop, step = (
        argument_of(op, i, key, default)
        for i, (key, default) in enumerate((("dim", 0), ("start", None), ("end", None), ("step", 1)), start=1)
    )
    dim %= len(shape)
    length = shape[dim]
    start, stop, step = slice(start, stop, step).indices(length)
    return dim, start, max(start, stop), step


def _piece_sizes(op: Op, length: int) -> tuple[int, ...]:
    given = op.args[1]
    if isinstance(given, tuple):
        return given
    size = -(-length // given) if "chunk" in op.target else given
    return tuple(min(size, length - start) for start in range(0, length, size))
