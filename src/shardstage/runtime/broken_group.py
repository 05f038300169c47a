"""``drop_sums``: a group whose sums do nothing: what a missing reduction looks like to the ranks, for tests of what must find it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from shardstage.errors import ConfigError
from shardstage.runtime.collectives import Collectives, Reduction
from shardstage.runtime.process_group import ShardstageProcessGroup

__all__ = ["drop_sums"]


def drop_sums(group: dist.ProcessGroup) -> None:
    """From now on, sums of floating tensors in ``group`` leave each rank with what it had; counts and maxima stay right.

    Every rank of the group must call it. Raises ConfigError for a group that is not ours.
    """
    if not isinstance(group, ShardstageProcessGroup):
        raise ConfigError(
            "faults are injected into the process group of CPU ranks, and this run has another",
            hint='device = "cpu"',
        )
    rank = group.rank()
    group.wrap_collectives(lambda inner: _WithoutSums(inner, rank))


class _WithoutSums:
    """Collectives that pass all calls on, but those that sum floating tensors."""

    def __init__(self, inner: Collectives, rank: int) -> None:
        self._inner = inner
        self._rank = rank

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def all_reduce(self, tensor: torch.Tensor, reduction: Reduction) -> dist.Work | None:
        if _is_sum(tensor, reduction):
            return None
        return self._inner.all_reduce(tensor, reduction)

    def reduce_scatter_single(
        self, output: torch.Tensor, tensor: torch.Tensor, reduction: Reduction
    ) -> dist.Work | None:
        if not _is_sum(tensor, reduction):
            return self._inner.reduce_scatter_single(output, tensor, reduction)
        start = self._rank * output.numel()
        output.copy_(tensor[start : start + output.numel()])
        return None

    def reduce_scatter(self, output: torch.Tensor, tensors: Any, reduction: Reduction) -> dist.Work | None:
        if not _is_sum(output, reduction):
            return self._inner.reduce_scatter(output, tensors, reduction)
        output.copy_(tensors[self._rank])
        return None


def _is_sum(tensor: torch.Tensor, reduction: Reduction) -> bool:
    return tensor.is_floating_point() and reduction in (Reduction.SUM, Reduction.AVG)
