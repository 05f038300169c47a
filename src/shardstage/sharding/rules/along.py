"""Ops that need some dims whole and treat the rest on its own: normalisations, softmax, reductions."""

from __future__ import annotations

from collections.abc import Callable

from shardstage.layout import Placement
from shardstage.sharding.call import Call, Place
from shardstage.sharding.state import PARTIAL, SUMMED, Blocked, Placing, State

__all__ = ["along", "place_normalise", "place_reduce", "place_sum"]


def along(dims_of: Callable[[Call], tuple[int, ...]]) -> Place:
    """The rule of an op that mixes elements along some dims only and keeps the shape."""

    def place(call: Call) -> Placing:
        name = call.tensors[0]
        _require_whole(call, name, dims_of(call))
        if call.shard(name) is None:
            return call.all_whole()
        return Placing(inputs={name: call.state(name).placement}, outputs=(call.state(name),))

    return place


def place_normalise(call: Call) -> Placing:
    """layer_norm and rms_norm: ``(x, normalized_shape, weight, bias, eps)``; weights see only this rank's rows."""
    name = call.tensors[0]
    ndim = len(call.shape(name))
    _require_whole(call, name, tuple(range(ndim - len(call.argument(1, "normalized_shape")), ndim)))
    if call.shard(name) is None:
        return call.all_whole()
    inputs: dict[str, Placement] = dict.fromkeys(call.tensors, SUMMED)
    inputs[name] = call.state(name).placement
    return Placing(inputs=inputs, outputs=(call.state(name),))


def place_reduce(call: Call) -> Placing:
    """A reduction over dims that are whole."""
    name = call.tensors[0]
    dims = _reduced_dims(call)
    _require_whole(call, name, dims)
    return _reduced(call, name, dims) if call.shard(name) is not None else call.all_whole()


def place_sum(call: Call) -> Placing:
    """A sum; over the sharded dim it leaves one summand on each rank."""
    name = call.tensors[0]
    dims = _reduced_dims(call)
    shard = call.shard(name)
    if shard is None:
        return call.all_whole()
    if shard.dim not in dims:
        return _reduced(call, name, dims)
    return Placing(inputs={name: shard}, outputs=(State(PARTIAL),), reduced=call.reduced(call.output_shape))


def _reduced(call: Call, name: str, dims: tuple[int, ...]) -> Placing:
    shard = call.shard(name)
    assert shard is not None
    keeps = len(call.output_shape) == len(call.shape(name))
    dim = shard.dim if keeps else shard.dim - sum(d < shard.dim for d in dims)
    state = State(shard.with_dim(dim), call.state(name).origins)
    return Placing(inputs={name: shard}, outputs=(state,) * len(call.op.outputs))


def _reduced_dims(call: Call) -> tuple[int, ...]:
    ndim = len(call.shape(call.tensors[0]))
    given = call.argument(1, "dim")
    if given is None or given == ():
        return tuple(range(ndim))
    return tuple(d % ndim for d in (given if isinstance(given, tuple) else (given,)))


def _require_whole(call: Call, name: str, dims: tuple[int, ...]) -> None:
    shard = call.shard(name)
    ndim = len(call.shape(name))
    if shard is not None and shard.dim in {d % ndim for d in dims}:
        raise Blocked((name,), f"{call.op.target} needs dim {shard.dim} whole")
