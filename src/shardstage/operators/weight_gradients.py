"""Products with a weight whose gradient goes straight to where it is summed: at once, or later, apart from the input's.

    y = x wᵀ        backward, at once:   dx = dy w        total += dyᵀ x      (one product, no tensor for the summand)
                    in two halves:  I    dx = dy w        remember (dy, x)
                                    W                     total += dyᵀ x

So a pipeline stage can hand ``dx`` to the stage before and do the rest while it would wait (Qi et al., "Zero Bubble Pipeline
Parallelism", 2023), and microbatches add up in place.
"""

# torch declares forward and backward of an autograd function with any arguments.
# mypy: disable-error-code="override"

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from shardstage.operators.context import OperatorContext

__all__ = ["addmm", "linear", "matmul"]


def linear(context: OperatorContext, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x wᵀ + bias`` with ``x [.., in]``, ``weight [out, in]``, ``bias [out]``."""
    if not _is_ours(context, weight):
        return torch.nn.functional.linear(x, weight, bias)
    return _Product.apply(x, weight, bias, context, True)  # type: ignore[no-untyped-call, no-any-return]


def matmul(context: OperatorContext, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x w + bias`` with ``x [.., in]``, ``weight [in, out]``, ``bias [out]``: GPT-2 lays its weights so."""
    if not _is_ours(context, weight):
        return torch.addmm(bias, x, weight) if bias is not None else x @ weight
    return _Product.apply(x, weight, bias, context, False)  # type: ignore[no-untyped-call, no-any-return]


def addmm(context: OperatorContext, bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """``matmul`` with the order of arguments of ``aten.addmm``."""
    return matmul(context, x, weight, bias)


def _is_ours(context: OperatorContext, weight: Tensor) -> bool:
    return context.weights.accumulate is not None and torch.is_grad_enabled() and weight.requires_grad


class _Product(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        context: OperatorContext,
        is_transposed: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.context, ctx.is_transposed = weight, context, is_transposed
        if is_transposed:
            return torch.nn.functional.linear(x, weight, bias)
        return torch.addmm(bias, x, weight) if bias is not None else x @ weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        needs_x, _, needs_bias = ctx.needs_input_grad[:3]
        flat, rows = _rows(gradient), _rows(x)
        if ctx.is_transposed:
            dx = gradient @ weight if needs_x else None
            ctx.context.weights.add(ctx.weight, flat.t(), rows)
        else:
            dx = gradient @ weight.t() if needs_x else None
            ctx.context.weights.add(ctx.weight, rows.t(), flat)
        return dx, None, flat.sum(0) if needs_bias else None, None, None


def _rows(x: Tensor) -> Tensor:
    """``x [.., n]`` as ``[rows, n]``, also where ``n`` is 0: a rank that has none of the heads."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
