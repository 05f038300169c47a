"""Embedding and cross-entropy where each rank holds some rows of the vocabulary."""

# torch declares forward and backward of an autograd function with any arguments.
# mypy: disable-error-code="override"

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from shardstage.operators.context import OperatorContext

__all__ = ["cross_entropy", "embedding"]

Intervals = tuple[tuple[int, int], ...]

_BLOCK_ELEMENTS = {"cpu": 1 << 18}
_LARGE_BLOCK_ELEMENTS = 1 << 26
"""Logits that are worked on at a time. 1 MiB of float32 stays in a core's cache from one pass to the next; elsewhere every block costs
launches, and 256 MiB keep them rare without being seen in the peak of a model whose logits are as large."""


def embedding(weight: Tensor, ids: Tensor, intervals: Intervals, padding_row: int = -1) -> Tensor:
    """Rows ``[.., features]`` of the ids that this rank holds (``weight`` is rows ``intervals`` of the table), zeros for the others.

    The row ``padding_row`` of the whole table gets no gradient.
    """
    if weight.shape[0] == 0:
        return weight.new_zeros((*ids.shape, weight.shape[1])) + weight.sum()
    local, is_elsewhere = _local_rows(ids, intervals)
    padding, is_other = _local_rows(torch.tensor(padding_row), intervals)
    rows = F.embedding(local, weight, None if padding_row < 0 or is_other else int(padding))
    return rows.masked_fill_(is_elsewhere.unsqueeze(-1), 0)


def cross_entropy(
    context: OperatorContext, logits: Tensor, labels: Tensor, intervals: Intervals, ignored_label: int
) -> Tensor:
    """Sum over targets of −log softmax(logits)[label], with ``logits [targets, local classes]``; equal on every rank.

        loss = Σ log Σ_c exp(z_c − m) + m − z_label,     m = max_c z_c

    m is one reduction, the two sums over classes another. What is kept for backward is the logits and one number a target.
    """
    return _CrossEntropy.apply(logits, labels, context, intervals, ignored_label)  # type: ignore[no-untyped-call, no-any-return]


class _CrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, context: OperatorContext, intervals: Intervals, ignored: int
    ) -> Tensor:
        local, is_elsewhere = _local_rows(labels, intervals)
        num_targets, num_classes = logits.shape
        highest = logits.amax(1) if num_classes else logits.new_full((num_targets,), -torch.inf)
        _reduce(highest, context, dist.ReduceOp.MAX)
        sums = logits.new_zeros((2, num_targets))  # of exponentials; of the label's logit
        if num_classes:
            for rows in _row_blocks(logits, context.device_kind):
                torch.sum((logits[rows] - highest[rows, None]).exp_(), 1, out=sums[0, rows])
            picked = logits.gather(1, local.unsqueeze(1)).squeeze(1)
            sums[1] = picked.masked_fill(is_elsewhere, 0)
        _reduce(sums, context, dist.ReduceOp.SUM)
        log_normaliser = sums[0].log_().add_(highest)
        is_target = labels != ignored
        ctx.device_kind = context.device_kind
        ctx.save_for_backward(logits, log_normaliser, local, is_elsewhere, is_target)
        return ((log_normaliser - sums[1]) * is_target).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, log_normaliser, local, is_elsewhere, is_target = ctx.saved_tensors
        result = torch.empty_like(logits)
        if result.numel() == 0:
            return result, None, None, None, None
        scale = gradient * is_target
        for rows in _row_blocks(logits, ctx.device_kind):
            block = torch.sub(logits[rows], log_normaliser[rows, None], out=result[rows])
            block.exp_().mul_(scale[rows, None])
        own = scale.masked_fill(is_elsewhere, 0).unsqueeze(1)
        result.scatter_add_(1, local.unsqueeze(1), -own)
        return result, None, None, None, None


def _local_rows(ids: Tensor, intervals: Intervals) -> tuple[Tensor, Tensor]:
    """Index of each id among the rows held here (0 where it is not one), and whether it is held elsewhere."""
    if len(intervals) == 1:
        start, stop = intervals[0]
        is_elsewhere = (ids < start) | (ids >= stop)
        return (ids - start).masked_fill_(is_elsewhere, 0), is_elsewhere
    local, is_elsewhere, held = torch.zeros_like(ids), torch.ones_like(ids, dtype=torch.bool), 0
    for start, stop in intervals:
        is_here = (ids >= start) & (ids < stop)
        local = torch.where(is_here, ids - start + held, local)
        is_elsewhere &= ~is_here
        held += stop - start
    return local, is_elsewhere


def _row_blocks(logits: Tensor, device_kind: str) -> list[slice]:
    step = max(1, _BLOCK_ELEMENTS.get(device_kind, _LARGE_BLOCK_ELEMENTS) // logits.shape[1])
    return [slice(start, start + step) for start in range(0, logits.shape[0], step)]


def _reduce(tensor: Tensor, context: OperatorContext, operation: Any) -> None:
    if context.tp_group is not None:
        dist.all_reduce(tensor, op=operation, group=context.tp_group)
