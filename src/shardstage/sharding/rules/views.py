"""Ops that only rename or merge dims: reshape, expand, transpose and the like."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from shardstage.graph import Op
from shardstage.sharding.call import Call, LocalCall, Place, with_arguments
from shardstage.sharding.reshape import reshape_shard
from shardstage.sharding.state import Blocked, Placing, Refine, State

__all__ = [
    "permuted",
    "place_expand",
    "place_repeat_interleave",
    "place_reshape",
    "rewrite_expand",
    "rewrite_reshape",
]


def place_reshape(call: Call) -> Placing:
    """The shard where it lies in the new shape; the cut is made coarser where a piece would end within a new dim."""
    name = call.tensors[0]
    shard = call.shard(name)
    if shard is None:
        return call.all_whole()
    found = reshape_shard(shard, call.shape(name), call.output_shape)
    if found is None:
        raise Blocked((name,), f"{call.op.target} merges the sharded dim with others")
    if isinstance(found, int):
        raise Refine(name, f"{call.op.target} divides the sharded dim by {found}", unit=found)
    new_shard, factor = found
    return _moved(call, name, State(new_shard, call.state(name).origins), factor)


def rewrite_reshape(call: LocalCall) -> tuple[Op, ...]:
    """The local shape; ``reshape``, for a part of a tensor may not be contiguous where the whole one is."""
    if call.output_local_shape == call.shape(call.output_name):
        return (call.op,)
    return (with_arguments(call.op, call.op.args[0], call.output_local_shape, target="aten.reshape.default"),)


def place_expand(call: Call) -> Placing:
    """A sharded dim is never one of those that are repeated."""
    name = call.tensors[0]
    shard = call.shard(name)
    if shard is None:
        return call.all_whole()
    dim = shard.dim + len(call.output_shape) - len(call.shape(name))
    if call.output_shape[dim] != shard.length:
        raise Blocked((name,), "a sharded dim of one element is expanded")
    return _moved(call, name, State(shard.with_dim(dim), call.state(name).origins))


def rewrite_expand(call: LocalCall) -> tuple[Op, ...]:
    return (with_arguments(call.op, call.op.args[0], call.output_local_shape),)


def permuted(new_dims: Callable[[Call, int], tuple[int, ...]]) -> Place:
    """The rule of an op whose output dim i is input dim ``new_dims(call, ndim)[i]``; -1 marks a new dim."""

    def place(call: Call) -> Placing:
        name = call.tensors[0]
        shard = call.shard(name)
        if shard is None:
            return call.all_whole()
        dims = new_dims(call, len(call.shape(name)))
        if shard.dim not in dims:
            raise Blocked((name,), f"{call.op.target} drops the sharded dim")
        return _moved(call, name, State(shard.with_dim(dims.index(shard.dim)), call.state(name).origins))

    return place


def place_repeat_interleave(call: Call) -> Placing:
    """``repeat_interleave(x, times, dim)``: pieces grow by as much."""
    name = call.tensors[0]
    shard = call.shard(name)
    if shard is None:
        return call.all_whole()
    times, dim = call.argument(1, "repeats"), call.argument(2, "dim")
    if not isinstance(times, int) or dim is None:
        raise Blocked((name,), "repeat_interleave with counts that depend on data")
    if dim % len(call.shape(name)) != shard.dim:
        return _moved(call, name, call.state(name))
    sections = tuple(tuple(size * times for size in section) for section in shard.sections)
    grown = State(type(shard)(dim=shard.dim, sections=sections), call.state(name).origins)
    return _moved(call, name, grown, Fraction(1, times))


def transpose_dims(call: Call, ndim: int) -> tuple[int, ...]:
    a, b = call.argument(1, "dim0") % ndim, call.argument(2, "dim1") % ndim
    swapped = {a: b, b: a}
    return tuple(swapped.get(d, d) for d in range(ndim))


def t_dims(_call: Call, ndim: int) -> tuple[int, ...]:
    return tuple(reversed(range(ndim)))


def permute_dims(call: Call, ndim: int) -> tuple[int, ...]:
    return tuple(d % ndim for d in call.argument(1, "dims"))


def unsqueeze_dims(call: Call, ndim: int) -> tuple[int, ...]:
    at = call.argument(1, "dim") % (ndim + 1)
    return (*range(at), -1, *range(at, ndim))


def squeeze_dims(call: Call, ndim: int) -> tuple[int, ...]:
    shape = call.shape(call.tensors[0])
    given = call.argument(1, "dim", tuple(range(ndim)))
    dims = {d % ndim for d in (given if isinstance(given, tuple) else (given,))}
    return tuple(d for d in range(ndim) if d not in dims or shape[d] != 1)


def same_dims(_call: Call, ndim: int) -> tuple[int, ...]:
    return tuple(range(ndim))


def _moved(call: Call, name: str, state: State, factor: Fraction = Fraction(1)) -> Placing:
    origins = tuple(origin.scaled(factor) for origin in state.origins)
    return Placing(inputs={name: call.state(name).placement}, outputs=(State(state.placement, origins),))
