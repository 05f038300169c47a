"""``RULES``: target → rule. An op that is not here runs whole on every rank, and is reported."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from shardstage.graph import Op
from shardstage.graph.attention import ATTENTION, draws_attention
from shardstage.sharding.call import Call, Place, Rewrite, Rule
from shardstage.sharding.rules import (
    along,
    attention,
    dropout,
    pointwise,
    product,
    random,
    slicing,
    views,
    vocabulary,
)
from shardstage.sharding.state import Placing, State

__all__ = ["RULES", "is_random", "rewrite_of"]

_POINTWISE = """
    _to_copy abs add.Scalar add.Tensor add_.Scalar add_.Tensor addcdiv addcmul alias atan2 bitwise_and.Tensor bitwise_not
    bitwise_or.Tensor ceil celu clamp clamp.Tensor clamp_max clamp_min clone contiguous copy cos detach detach_ div.Scalar
    div.Tensor div.Tensor_mode div_.Scalar div_.Tensor elu eq.Scalar eq.Tensor erf exp exp2 expm1 floor floor_divide
    floor_divide.Scalar fmod.Scalar fmod.Tensor full_like ge.Scalar ge.Tensor gelu gelu_ gt.Scalar gt.Tensor hardsigmoid
    hardswish hardtanh isinf isnan le.Scalar le.Tensor leaky_relu leaky_relu_ lerp.Scalar lerp.Tensor lift_fresh_copy log log1p
    log2 log_sigmoid logical_and logical_not logical_or lt.Scalar lt.Tensor masked_fill.Scalar masked_fill.Tensor
    masked_fill_.Scalar masked_fill_.Tensor max.other maximum min.other minimum mish mul.Scalar mul.Tensor mul_.Scalar
    mul_.Tensor nan_to_num ne.Scalar ne.Tensor neg ones_like pow.Scalar pow.Tensor_Scalar pow.Tensor_Tensor reciprocal relu
    relu6 relu_ remainder.Scalar remainder.Tensor round rsqrt rsub.Scalar rsub.Tensor selu sgn sigmoid sigmoid_ sign silu silu_
    sin softplus sqrt square sub.Scalar sub.Tensor sub_.Scalar sub_.Tensor tan tanh tanh_ threshold to.device to.dtype
    to.dtype_layout to.other trunc type_as where.ScalarOther where.ScalarSelf where.self zeros_like
"""

_RESHAPE = "_reshape_alias _unsafe_view flatten.using_ints reshape unflatten.int view view_as"

_ALONG_DIM = "_log_softmax _softmax cumsum cumprod flip log_softmax.int softmax.int logcumsumexp"

_REDUCTIONS = "all.dim amax amin any.dim argmax argmin logsumexp max.dim mean.dim min.dim prod.dim_int std.correction std.dim var.correction var.dim"  # noqa: E501

_CREATIONS = "new_empty new_full new_ones new_zeros"
"""Ops that read nothing of their input but its dtype and device."""


def is_random(op: Op) -> bool:
    """Whether the op draws random numbers that are ours to draw."""
    if op.target == "aten.dropout.default":
        return dropout.draws_dropout(op)
    if op.target == ATTENTION:
        return draws_attention(op)
    return random.draws_otherwise(op)


def rewrite_of(op: Op) -> Rewrite | None:
    """What writes the local form of an op; None for one that stays as it is."""
    if random.draws_otherwise(op):
        return random.rewrite_seeded
    rule = RULES.get(op.target)
    return None if rule is None else rule.rewrite


def _place_creation(call: Call) -> Placing:
    inputs = {name: call.state(name).placement for name in call.tensors}
    return Placing(inputs=inputs, outputs=(State(),) * len(call.op.outputs))


def _softmax_dims(call: Call) -> tuple[int, ...]:
    given = call.argument(1, "dim")
    return given if isinstance(given, tuple) else (given,)


def _last_two(_call: Call) -> tuple[int, ...]:
    return (-2, -1)


def _targets(words: str) -> list[str]:
    return [f"aten.{word if '.' in word else word + '.default'}" for word in words.split()]


def _family(words: str, place: Place, rewrite: Rewrite | None = None) -> dict[str, Rule]:
    rule = Rule(place) if rewrite is None else Rule(place, rewrite)
    return dict.fromkeys(_targets(words), rule)


def _moves() -> dict[str, Rule]:
    return {
        **_family(_RESHAPE, views.place_reshape, views.rewrite_reshape),
        **_family("expand expand_as", views.place_expand, views.rewrite_expand),
        **_family("transpose.int", views.permuted(views.transpose_dims)),
        **_family("t", views.permuted(views.t_dims)),
        **_family("permute", views.permuted(views.permute_dims)),
        **_family("unsqueeze", views.permuted(views.unsqueeze_dims)),
        **_family("squeeze squeeze.dim squeeze.dims", views.permuted(views.squeeze_dims)),
        **_family("repeat_interleave.self_int", views.place_repeat_interleave),
        **_family("slice.Tensor", slicing.place_slice, slicing.rewrite_slice),
        **_family(
            "chunk split.Tensor split.sizes split_with_sizes", slicing.place_split, slicing.rewrite_split
        ),
        **_family("select.int", slicing.place_select),
        **_family("unbind.int", slicing.place_unbind),
        **_family("cat concat", slicing.place_cat),
    }


def _products() -> dict[str, Rule]:
    return {
        **_family("linear", product.place_linear, product.rewrite_linear),
        **_family("addmm", product.place_addmm, product.rewrite_addmm),
        **_family("matmul mm bmm", product.place_matmul),
        **_family("_grouped_mm", product.place_grouped),
        "transformers.grouped_mm_fallback.default": Rule(product.place_grouped),
    }


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        **_family(_POINTWISE, pointwise.place_pointwise),
        **_family(_CREATIONS, _place_creation),
        **_family(_ALONG_DIM, along.along(_softmax_dims)),
        **_family("tril triu", along.along(_last_two)),
        **_family(_REDUCTIONS, along.place_reduce),
        **_family("sum sum.dim_IntList", along.place_sum),
        **_family("layer_norm rms_norm", along.place_normalise),
        **_moves(),
        **_products(),
        ATTENTION: Rule(attention.place_attention, attention.rewrite_attention),
        "aten.embedding.default": Rule(vocabulary.place_embedding, vocabulary.rewrite_embedding),
        "aten.cross_entropy_loss.default": Rule(
            vocabulary.place_cross_entropy, vocabulary.rewrite_cross_entropy
        ),
        "aten.dropout.default": Rule(dropout.place_dropout, dropout.rewrite_dropout),
    }
)
