"""Dropout, whose mask must not depend on who computes it."""

from __future__ import annotations

from dataclasses import replace

from shardstage.graph import Op
from shardstage.layout import Shard
from shardstage.sharding.call import Call, LocalCall
from shardstage.sharding.state import Placing

__all__ = ["draws_dropout", "place_dropout", "rewrite_dropout"]


def place_dropout(call: Call) -> Placing:
    """Each rank drops its part."""
    name = call.tensors[0]
    shard = call.shard(name)
    if shard is None:
        return call.all_whole()
    return Placing(inputs={name: shard}, outputs=(call.state(name),))


def draws_dropout(op: Op) -> bool:
    """Whether anything is dropped: ``dropout(x, p, train)``."""
    return bool(op.args[1] > 0 and op.args[2])


def rewrite_dropout(call: LocalCall) -> tuple[Op, ...]:
    """``shardstage.dropout(x, p, ordinal, whole shape, samples, dim that is cut, its intervals)``."""
    if not draws_dropout(call.op):
        return (call.op,)
    name = call.whole_name(0, "input")
    assert name is not None
    shape, placement = call.shape(name), call.output_placement
    dim, intervals = (
        (
            (placement.dim, placement.intervals(call.rank))
            if isinstance(placement, Shard)
            else (0, ((0, shape[0]),))
        )
        if shape
        else (0, ())
    )
    args = (*call.op.args[:2], call.random_ordinal, shape, call.graph.microbatch, dim, intervals)
    return (replace(call.op, target="shardstage.dropout", args=args, kwargs=()),)
