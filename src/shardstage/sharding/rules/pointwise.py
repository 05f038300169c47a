"""Ops that treat every element on its own, broadcasting included."""

from __future__ import annotations

from shardstage.layout import Placement, Shard
from shardstage.sharding.call import Call
from shardstage.sharding.state import SUMMED, Blocked, Origin, Placing, Refine, State

__all__ = ["place_pointwise"]


def place_pointwise(call: Call) -> Placing:
    """The output is cut as the sharded inputs are; a whole input is cut likewise, or summed over where it is broadcast.

    [B, S, H/n] * [H]       the second is cut too
    [B, H/n, S] + [S]       every rank needs all of the second, and has a summand of its gradient
    """
    if not call.sharded:
        return call.all_whole()
    shape = call.output_shape
    chosen = _common_shard(call, len(shape))
    inputs: dict[str, Placement] = {}
    origins: tuple[Origin, ...] = ()
    for name in call.tensors:
        inputs[name] = _operand(call.shape(name), chosen, len(shape))
        if call.shard(name) is not None:
            origins = (*origins, *call.state(name).origins)
    state = State(chosen, tuple(dict.fromkeys(origins)))
    return Placing(inputs=inputs, outputs=(state,) * len(call.op.outputs))


def _common_shard(call: Call, ndim: int) -> Shard:
    """The shard that all sharded inputs agree on, in dims of the output."""
    found = [(name, _in_output(call, name, ndim)) for name in call.sharded]
    first_name, first = found[0]
    for name, shard in found[1:]:
        if shard != first:
            raise _disagreement(call, first_name, first, name, shard)
    return first


def _in_output(call: Call, name: str, ndim: int) -> Shard:
    shard = call.shard(name)
    assert shard is not None
    dim = shard.dim + ndim - len(call.shape(name))
    if call.shape(name)[shard.dim] != call.output_shape[dim]:
        raise Blocked((name,), f"a sharded dim of one element is broadcast by {call.op.target}")
    return shard.with_dim(dim)


def _disagreement(call: Call, a: str, shard_a: Shard, b: str, shard_b: Shard) -> Exception:
    """Which of two shards must change; those that follow no parameter give way."""
    origins_a, origins_b = call.state(a).origins, call.state(b).origins
    reason = f"{call.op.target} joins values that are cut differently"
    if not origins_a or not origins_b:
        return Blocked((b,) if origins_a else (a,), reason)
    if shard_a.dim != shard_b.dim:
        return Blocked((a, b), reason)
    unit_a, unit_b = (max(map(call.cuts.unit, origins)) for origins in (origins_a, origins_b))
    if len(shard_a.sections) == len(shard_b.sections) and unit_a != unit_b:
        return Refine(a, reason, unit=unit_b) if unit_a < unit_b else Refine(b, reason, unit=unit_a)
    if len(shard_a.sections) != len(shard_b.sections):
        coarse, fine = (a, shard_b) if len(shard_a.sections) < len(shard_b.sections) else (b, shard_a)
        return Refine(coarse, reason, boundaries=boundaries(fine))
    return Blocked((a, b), reason)


def boundaries(shard: Shard) -> tuple[int, ...]:
    """Where each section of the whole dim ends."""
    ends: list[int] = []
    for section in shard.sections:
        ends.append(sum(section) + (ends[-1] if ends else 0))
    return tuple(ends)


def _operand(shape: tuple[int, ...], chosen: Shard, ndim: int) -> Placement:
    dim = chosen.dim - (ndim - len(shape))
    if dim < 0 or shape[dim] != chosen.length:
        return SUMMED
    return chosen.with_dim(dim)
