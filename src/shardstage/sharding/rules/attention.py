"""Scaled dot-product attention, cut by heads."""

from __future__ import annotations

from dataclasses import replace

from shardstage.graph import Op, Ref
from shardstage.graph.attention import DROPPING_ATTENTION, draws_attention
from shardstage.layout import Placement, Shard
from shardstage.sharding.call import Call, LocalCall
from shardstage.sharding.state import SUMMED, Blocked, Placing, Refine, State

__all__ = ["place_attention", "rewrite_attention"]

_HEADS = -3
"""Dim of the heads in ``[.., heads, tokens, features]``."""

_SELECT = "select"

_ATTENTION_WEIGHT = 3
"""FLOPs of a query head over those of a key or value projection of one head: its own and the output projection, and its scores."""


def place_attention(call: Call) -> Placing:
    """Query heads are cut as they come; key and value heads must follow, or be whole and picked by each rank."""
    query, key, value = (call.name(i, k) for i, k in enumerate(("query", "key", "value")))
    assert query is not None and key is not None and value is not None
    heads = call.shard(query)
    if heads is None:
        if call.shard(key) is not None or call.shard(value) is not None:
            raise Blocked(tuple({key, value} & set(call.sharded)), "the query heads are whole")
        return call.all_whole()
    dim = len(call.shape(query)) + _HEADS
    if heads.dim != dim:
        raise Blocked((query,), "attention is cut by heads only")
    inputs, form = _keys_and_values(call, query, key, value)
    mask = call.name(3, "attn_mask")
    if mask is not None:
        inputs[mask] = _mask_placement(call.shape(mask), heads)
    origins = dict.fromkeys(o for name in (query, key, value) for o in call.state(name).origins)
    return Placing(inputs={query: heads, **inputs}, outputs=(State(heads, tuple(origins)),), form=form)


def _keys_and_values(call: Call, query: str, key: str, value: str) -> tuple[dict[str, Placement], str]:
    heads = call.shard(query)
    assert heads is not None
    group = heads.length // call.shape(key)[_HEADS]
    found = {call.shard(key), call.shard(value)}
    if found == {None}:
        is_picked = group > 1
        placement = SUMMED if is_picked else heads
        return {key: placement, value: placement}, _SELECT if is_picked else ""
    if len(found) == 2:
        raise Blocked(tuple({key, value} & set(call.sharded)), "keys and values are cut differently")
    shard = next(iter(found))
    assert shard is not None
    if shard.dim != heads.dim:
        raise Blocked((key, value), "attention is cut by heads only")
    if heads.sections != tuple(tuple(size * group for size in section) for section in shard.sections):
        raise _misaligned(call, query, key, value, group)
    return {key: shard, value: shard}, ""


def _misaligned(call: Call, query: str, key: str, value: str, group: int) -> Exception:
    """Cut the query heads in whole groups, or leave keys and values whole: whatever leaves the slowest rank less to do."""
    num_heads, num_groups = call.shape(query)[_HEADS], call.shape(key)[_HEADS]
    reason = (
        f"{num_groups} key-value heads do not line up with {num_heads} query heads on {call.num_ranks} ranks"
    )
    aligned = -(-num_groups // call.num_ranks) * (_ATTENTION_WEIGHT * group + 2)
    picked = -(-num_heads // call.num_ranks) * _ATTENTION_WEIGHT + 2 * num_groups
    is_fused = {o.parameter for o in call.state(query).origins} & {
        o.parameter for o in call.state(key).origins
    }
    if is_fused or (num_groups >= call.num_ranks and aligned <= picked):
        return Refine(query, reason, unit=group)
    return Blocked((key, value), reason)


def _mask_placement(shape: tuple[int, ...], heads: Shard) -> Placement:
    is_cut = len(shape) >= -_HEADS and shape[_HEADS] == heads.length and heads.length > 1
    return heads.with_dim(len(shape) + _HEADS) if is_cut else SUMMED


def rewrite_attention(call: LocalCall) -> tuple[Op, ...]:
    """Picks the key and value heads of this rank's query heads; drops probabilities by our own random numbers."""
    op: Op = call.op
    before: tuple[Op, ...] = ()
    if call.placing.form == _SELECT:
        op, before = _with_picked_heads(call)
    if draws_attention(op):
        op = _with_own_dropout(call, op)
    return (*before, op)


def _with_picked_heads(call: LocalCall) -> tuple[Op, tuple[Op, ...]]:
    heads = call.output_placement
    assert isinstance(heads, Shard)
    key = call.whole_name(1, "key")
    assert key is not None
    group = heads.length // call.shape(key)[_HEADS]
    wanted = [head // group for start, stop in heads.intervals(call.rank) for head in range(start, stop)]
    picked, is_grouped = _picked_heads(wanted)
    keywords = {name: value for name, value in call.op.kwargs if name != "enable_gqa"}
    query, key_argument, value_argument, *rest = call.op.args
    picks = tuple(
        Op(
            name=f"{call.op.name}@select_{name}",
            target="shardstage.select_heads",
            args=(argument, heads.dim, picked),
            outputs=(f"{call.op.name}@select_{name}",),
        )
        for name, argument in (("key", key_argument), ("value", value_argument))
    )
    args = (query, *(Ref(pick.name) for pick in picks), *rest)
    kwargs = (*keywords.items(), ("enable_gqa", is_grouped))
    return replace(call.op, args=args, kwargs=kwargs), picks


def _picked_heads(wanted: list[int]) -> tuple[tuple[int, ...], bool]:
    """Key heads to pick, and whether each serves equally many query heads in turn."""
    distinct = tuple(dict.fromkeys(wanted))
    counts = {wanted.count(head) for head in distinct}
    return (distinct, counts != {1}) if len(counts) == 1 else (tuple(wanted), False)


def _with_own_dropout(call: LocalCall, op: Op) -> Op:
    """``shardstage.attention(q, k, v, mask, p, is_causal, scale, ordinal, heads of the whole tensor, heads of this rank)``."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    keywords = dict(op.kwargs)
    given = [
        op.args[i] if i < len(op.args) else keywords.get(k, d)
        for i, (k, d) in enumerate(zip(names, (None, None, None, None, 0.0, False, None, False), strict=True))
    ]
    heads = call.output_placement
    num_heads = call.shape(call.output_name)[_HEADS]
    intervals = heads.intervals(call.rank) if isinstance(heads, Shard) else ((0, num_heads),)
    return replace(
        op,
        target=DROPPING_ATTENTION,
        args=(*given, call.random_ordinal, num_heads, intervals),
        kwargs=(),
    )
