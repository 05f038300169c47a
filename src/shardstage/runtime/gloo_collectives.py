"""The collectives of a group whose ranks cannot share memory: gloo, completed where it lacks a form.

Tensors are contiguous, one-dimensional and on the CPU, as in ``shared_collectives``. Every method
returns gloo's Work (None: done), as Any, for torch declares its back ends untyped.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from shardstage import compat
from shardstage.runtime.collectives import Reduction

__all__ = ["GlooCollectives"]


class GlooCollectives:
    """Collectives and point to point messages over TCP; asynchronous as gloo's own are."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        self._rank = rank
        self._size = size
        self._gloo: Any = dist.ProcessGroupGloo(store, rank, size, timeout=timeout)

    def barrier(self) -> Any:
        """Completes once every rank has called it."""
        return self._gloo.barrier(dist.BarrierOptions())

    def all_reduce(self, tensor: torch.Tensor, reduction: Reduction) -> Any:
        """Replaces ``tensor`` by the reduction over all ranks' tensors."""
        options = dist.AllreduceOptions()
        options.reduceOp = _operator(reduction)
        return self._gloo.allreduce([tensor], options)

    def reduce(self, tensor: torch.Tensor, reduction: Reduction, root: int) -> Any:
        """Replaces ``tensor`` of ``root`` by the reduction over all ranks' tensors."""
        mine = tensor if self._rank == root else tensor.clone()  # gloo leaves partial sums in the others'
        options = dist.ReduceOptions()
        options.reduceOp, options.rootRank = _operator(reduction), root
        return self._gloo.reduce([mine], options)

    def all_gather(self, outputs: Sequence[torch.Tensor], tensor: torch.Tensor) -> Any:
        """Fills ``outputs[rank]`` with that rank's ``tensor``; sizes may differ by rank."""
        if len({output.numel() for output in outputs}) == 1:
            return self._gloo.allgather([list(outputs)], [tensor])
        outputs[self._rank].copy_(tensor)
        _wait([self.broadcast(output, root) for root, output in enumerate(outputs)])
        return None

    def all_gather_single(self, output: torch.Tensor, tensor: torch.Tensor) -> Any:
        """Fills ``output`` [n * N] with the ranks' tensors [N] in rank order."""
        return self.all_gather(list(output.chunk(self._size)) or [output] * self._size, tensor)

    def gather(self, outputs: Sequence[torch.Tensor] | None, tensor: torch.Tensor, root: int) -> Any:
        """Fills ``outputs[rank]`` of ``root`` with that rank's ``tensor``."""
        options = dist.GatherOptions()
        options.rootRank = root
        return self._gloo.gather([] if outputs is None else [list(outputs)], [tensor], options)

    def reduce_scatter(
        self, output: torch.Tensor, tensors: Sequence[torch.Tensor], reduction: Reduction
    ) -> Any:
        """Fills ``output`` with the reduction over ranks of their ``tensors[my rank]``; sizes may differ by rank."""
        if len({tensor.numel() for tensor in tensors}) == 1:
            return self.reduce_scatter_single(output, torch.cat(list(tensors)), reduction)
        mine = [tensor.clone() for tensor in tensors]
        _wait([self.reduce(part, reduction, root) for root, part in enumerate(mine)])
        output.copy_(mine[self._rank])
        return None

    def reduce_scatter_single(self, output: torch.Tensor, tensor: torch.Tensor, reduction: Reduction) -> Any:
        """Fills ``output`` [N] with my part of the reduction over the ranks' ``tensor`` [n * N]."""
        options = dist.ReduceScatterOptions()
        options.reduceOp = _operator(reduction)
        return compat.backend_reduce_scatter(self._gloo, output, tensor, options)

    def broadcast(self, tensor: torch.Tensor, root: int) -> Any:
        """Fills ``tensor`` of every rank with that of ``root``."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = root, 0
        return self._gloo.broadcast([tensor], options)

    def all_to_all(self, outputs: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor]) -> None:
        """Fills ``outputs[rank]`` with that rank's ``tensors[my rank]``; sizes may differ by pair."""
        received = torch.empty(sum(output.numel() for output in outputs), dtype=outputs[0].dtype)
        sizes = [[part.numel() for part in parts] for parts in (outputs, tensors)]
        _wait([compat.backend_all_to_all(self._gloo, received, torch.cat(list(tensors)), *sizes)])
        for output, part in zip(outputs, torch.split(received, sizes[0]), strict=True):
            output.copy_(part)

    def scatter(self, output: torch.Tensor, tensors: Sequence[torch.Tensor] | None, root: int) -> Any:
        """Fills ``output`` with ``tensors[my rank]`` of ``root``."""
        options = dist.ScatterOptions()
        options.rootRank = root
        return self._gloo.scatter([output], [] if tensors is None else [list(tensors)], options)

    def send(self, tensor: torch.Tensor, destination: int, tag: int) -> Any:
        """Sends ``tensor``, which must not change before the Work is done."""
        return self._gloo.send([tensor], destination, tag)

    def receive(self, tensor: torch.Tensor, source: int | None, tag: int) -> Any:
        """Fills ``tensor`` with the next message of ``source`` with that tag; None is any rank."""
        if source is None:
            return self._gloo.recv_anysource([tensor], tag)
        return self._gloo.recv([tensor], source, tag)

    def close(self) -> None:
        """Ends gloo's connections with the object."""


def _operator(reduction: Reduction) -> Any:
    return getattr(dist.ReduceOp, reduction.name)


def _wait(works: Sequence[dist.Work]) -> None:
    for work in works:
        work.wait()
