"""One autograd function for each change of placement: what it does to a value, and what to its gradient.

sum_gradient    I → R   nothing                 all_reduce
all_reduce      P → I   all_reduce              nothing
all_gather      S → R   all_gather              reduce_scatter
gather_whole    S → I   all_gather              take my part
slice           I → S   take my part            all_gather
narrow          R → S   take my part            zeros around it (autograd's own; also where there is no gradient)
reduce_scatter  P → S   reduce_scatter          all_gather
"""

# torch declares forward and backward of an autograd function with any arguments.
# mypy: disable-error-code="override"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from shardstage.operators import moves
from shardstage.operators.context import OperatorContext
from shardstage.operators.moves import Sections, intervals_of, take

__all__ = [
    "all_gather",
    "all_reduce",
    "gather_whole",
    "reduce_scatter",
    "select_heads",
    "slice_whole",
    "sum_gradient",
]


def sum_gradient(context: OperatorContext, x: Tensor, is_gradient_fresh: bool) -> Tensor:
    """I → R. ``is_gradient_fresh`` says that the gradient that arrives is nobody else's and may be overwritten."""
    return _SumGradient.apply(x, context, is_gradient_fresh)  # type: ignore[no-untyped-call, no-any-return]


def all_reduce(context: OperatorContext, x: Tensor) -> Tensor:
    """P → I."""
    return _AllReduce.apply(x, context)  # type: ignore[no-untyped-call, no-any-return]


def all_gather(context: OperatorContext, x: Tensor, dim: int, sections: Sections) -> Tensor:
    """S → R."""
    return _AllGather.apply(x, context, dim, sections)  # type: ignore[no-untyped-call, no-any-return]


def gather_whole(context: OperatorContext, x: Tensor, dim: int, sections: Sections) -> Tensor:
    """S → I."""
    return _GatherWhole.apply(x, context, dim, sections)  # type: ignore[no-untyped-call, no-any-return]


def slice_whole(context: OperatorContext, x: Tensor, dim: int, sections: Sections) -> Tensor:
    """I → S."""
    return _Slice.apply(x, context, dim, sections)  # type: ignore[no-untyped-call, no-any-return]


def reduce_scatter(context: OperatorContext, x: Tensor, dim: int, sections: Sections) -> Tensor:
    """P → S."""
    return _ReduceScatter.apply(x, context, dim, sections)  # type: ignore[no-untyped-call, no-any-return]


def select_heads(x: Tensor, dim: int, heads: tuple[int, ...]) -> Tensor:
    """The heads, in order, repetitions included; a view where they are neighbours."""
    first = heads[0] if heads else 0
    if heads == tuple(range(first, first + len(heads))):
        return x.narrow(dim, first, len(heads))
    return x.index_select(dim, torch.tensor(heads, device=x.device))


class _SumGradient(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, context: OperatorContext, is_fresh: bool) -> Tensor:
        ctx.context, ctx.is_fresh = context, is_fresh
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return moves.all_reduce(gradient, ctx.context, in_place=ctx.is_fresh), None, None


class _AllReduce(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, context: OperatorContext) -> Tensor:
        # In place behind autograd's back: nothing that made x keeps it, and nobody else reads it.
        return moves.all_reduce(x.detach(), context, in_place=context.may_overwrite)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _AllGather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, context: OperatorContext, dim: int, sections: Sections) -> Tensor:
        ctx.cut = dim, sections, context
        return moves.gather(x, dim, sections, context)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return moves.reduce_scatter(gradient, *ctx.cut), None, None, None


class _GatherWhole(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, context: OperatorContext, dim: int, sections: Sections) -> Tensor:
        ctx.cut = dim, intervals_of(sections, context.tp_rank)
        return moves.gather(x, dim, sections, context)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return take(gradient, *ctx.cut), None, None, None


class _Slice(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, context: OperatorContext, dim: int, sections: Sections) -> Tensor:
        ctx.cut = dim, sections, context
        return take(x, dim, intervals_of(sections, context.tp_rank))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return moves.gather(gradient, *ctx.cut), None, None, None


class _ReduceScatter(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, context: OperatorContext, dim: int, sections: Sections) -> Tensor:
        ctx.cut = dim, sections, context
        return moves.reduce_scatter(x, dim, sections, context)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return moves.gather(gradient, *ctx.cut), None, None, None
