"""Dropout whose mask is a function of seed, step, sample and op: equal on every mesh."""

# torch declares forward and backward of an autograd function with any arguments.
# mypy: disable-error-code="override"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from shardstage.operators.context import OperatorContext, RandomState
from shardstage.operators.moves import take

__all__ = ["attention", "dropout"]

Intervals = tuple[tuple[int, int], ...]

_NO_SAMPLE = -1
"""Stands for the sample of a tensor that has none: a table of positions, say."""


def dropout(
    context: OperatorContext,
    x: Tensor,
    p: float,
    ordinal: int,
    whole_shape: tuple[int, ...],
    num_samples: int,
    dim: int,
    intervals: Intervals,
) -> Tensor:
    """``x`` with elements zeroed with probability ``p`` and the rest scaled by 1 / (1 - p).

    ``x`` is the part ``intervals`` along ``dim`` of a tensor of ``whole_shape``, whose dim 0 is made of ``num_samples`` equal runs.
    The mask of each sample is drawn whole, and cut.
    """
    kept = _kept(context.random, x.device, p, ordinal, whole_shape, num_samples, dim, intervals)
    return _Dropout.apply(x, kept.view(x.shape), p)  # type: ignore[no-untyped-call, no-any-return]


def attention(
    context: OperatorContext,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    p: float,
    is_causal: bool,
    scale: float | None,
    is_grouped: bool,
    ordinal: int,
    num_heads: int,
    heads: Intervals,
) -> Tensor:
    """Scaled dot-product attention of this rank's ``heads`` with dropped probabilities: ``[batch, heads, tokens, features]``.

    The mask of each head of each sample is drawn on its own, so that a rank draws those of its heads only.
    """
    if is_grouped and query.shape[-3] != key.shape[-3]:
        group = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(group, -3), value.repeat_interleave(group, -3)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query * factor) @ key.transpose(-2, -1)
    if is_causal:
        scores = scores.masked_fill(_future(scores), -torch.inf)
    elif mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    wide = torch.promote_types(scores.dtype, torch.float32)
    probabilities = scores.softmax(-1, dtype=wide).to(scores.dtype)
    kept = _kept_probabilities(context.random, probabilities, p, ordinal, num_heads, heads)
    return _Dropout.apply(probabilities, kept, p) @ value  # type: ignore[no-untyped-call, no-any-return]


class _Dropout(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, p: float) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.factor = 1 / (1 - p) if p < 1 else 0.0
        return (x * kept).mul_(ctx.factor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (kept,) = ctx.saved_tensors
        return (gradient * kept).mul_(ctx.factor), None, None


def _kept(
    random: RandomState,
    device: torch.device,
    p: float,
    ordinal: int,
    shape: tuple[int, ...],
    num_samples: int,
    dim: int,
    intervals: Intervals,
) -> Tensor:
    """True where an element stays: this rank's part of the mask."""
    if not shape or shape[0] % num_samples or len(random.positions) != num_samples:
        drawn = random.uniforms(shape, device, ordinal, _NO_SAMPLE) >= p
        return take(drawn, dim, intervals) if shape else drawn
    sample_shape = (shape[0] // num_samples, *shape[1:])
    parts = []
    for position in random.positions:
        drawn = random.uniforms(sample_shape, device, ordinal, position) >= p
        parts.append(drawn if dim == 0 else take(drawn, dim, intervals))
    kept = torch.cat(parts)
    return take(kept, 0, intervals) if dim == 0 else kept


def _kept_probabilities(
    random: RandomState, like: Tensor, p: float, ordinal: int, num_heads: int, heads: Intervals
) -> Tensor:
    """[batch, heads of this rank, queries, keys]"""
    wanted = [head for start, stop in heads for head in range(start, stop)]
    kept = torch.empty(like.shape, dtype=torch.bool, device=like.device)
    has_samples = len(random.positions) == like.shape[0]
    for sample in range(like.shape[0]):
        position = random.positions[sample] if has_samples else _NO_SAMPLE - sample
        for index, head in enumerate(wanted):
            key = (ordinal, position, head)
            torch.ge(random.uniforms(like.shape[-2:], like.device, *key), p, out=kept[sample, index])
    return kept


def _future(scores: Tensor) -> Tensor:
    """True above the diagonal."""
    return torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)
