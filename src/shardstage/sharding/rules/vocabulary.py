"""The two ends of a language model: embedding and cross-entropy over a cut vocabulary."""

from __future__ import annotations

from dataclasses import replace

from shardstage.graph import Op, Ref
from shardstage.layout import Shard
from shardstage.sharding.call import Call, LocalCall
from shardstage.sharding.state import PARTIAL, SUMMED, WHOLE, Blocked, Placing, State

__all__ = ["place_cross_entropy", "place_embedding", "rewrite_cross_entropy", "rewrite_embedding"]

_MIN_ROWS_PER_RANK = 8
"""Tables with fewer rows are not worth a reduction of their output: token types, buckets of relative positions."""

_SUM = 2
"""ATen's code for a loss that is summed over its targets."""


def place_embedding(call: Call) -> Placing:
    """``embedding(weight [rows, features], ids)``: each rank looks up the rows that it holds.

    Only where ids come from the batch: position tables are small and looked up in order.
    """
    weight, ids = call.name(0, "weight"), call.name(1, "indices")
    assert weight is not None and ids is not None
    if call.shard(weight) is not None:
        raise Blocked((weight,), "a table that is computed is cut")
    cut = _rows(call, weight, ids)
    if cut is not None:
        return Placing(
            inputs={weight: cut, ids: WHOLE},
            outputs=(State(PARTIAL),),
            form="rows",
            reduced=call.reduced(call.output_shape),
        )
    state = call.state(ids)
    if state.shard is None:
        return call.all_whole()
    return Placing(inputs={weight: SUMMED, ids: state.shard}, outputs=(state,))


def _rows(call: Call, weight: str, ids: str) -> Shard | None:
    if weight not in call.free or ids not in call.of_batch:
        return None
    parameter, dims = call.free[weight]
    num_rows = call.shape(weight)[0]
    if num_rows < _MIN_ROWS_PER_RANK * call.num_ranks:
        return None
    return call.cuts.shard(parameter, dims[0], num_rows)


def rewrite_embedding(call: LocalCall) -> tuple[Op, ...]:
    """``shardstage.embedding(weight [local rows, features], ids, start, stop, padding row)``."""
    weight = call.whole_name(0, "weight")
    assert weight is not None
    rows = call.given(weight)
    if call.placing.form != "rows" or not isinstance(rows, Shard):
        return (call.op,)
    padding = call.argument(2, "padding_idx", -1)
    args = (*call.op.args[:2], rows.intervals(call.rank), padding)
    return (replace(call.op, target="shardstage.embedding", args=args, kwargs=()),)


def place_cross_entropy(call: Call) -> Placing:
    """``cross_entropy_loss(logits [targets, classes], labels [targets])``: each rank holds some classes, or some targets."""
    logits, labels = call.name(0, "self"), call.name(1, "target")
    assert logits is not None and labels is not None
    shard = call.shard(logits)
    if shard is None:
        return call.whole(call.sharded).all_whole()
    is_plain = call.argument(2, "weight") is None and call.argument(5, "label_smoothing", 0.0) == 0.0
    is_summed = call.argument(3, "reduction", 1) == _SUM
    if not (is_plain and is_summed and len(call.shape(logits)) == 2 and len(call.shape(labels)) == 1):
        raise Blocked((logits,), "the loss is more than a sum of cross-entropies over [targets, classes]")
    if shard.dim == 0:
        return Placing(inputs={logits: shard, labels: shard}, outputs=(State(PARTIAL),))
    return Placing(inputs={logits: shard, labels: WHOLE}, outputs=(State(),), form="classes")


def rewrite_cross_entropy(call: LocalCall) -> tuple[Op, ...]:
    """``shardstage.cross_entropy(logits [targets, local classes], labels, intervals, ignored label)``."""
    if call.placing.form != "classes":
        return (call.op,)
    logits = call.whole_name(0, "self")
    assert logits is not None
    shard = call.given(logits)
    assert isinstance(shard, Shard)
    ignored = call.argument(4, "ignore_index", -100)
    args: tuple[Ref | object, ...] = (*call.op.args[:2], shard.intervals(call.rank), ignored)
    return (replace(call.op, target="shardstage.cross_entropy", args=args, kwargs=()),)
