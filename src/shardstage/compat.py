"""The only place that touches private torch names: each with the reason and the versions it was tried on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, overload

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import (  # documented by torch, never made public
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode  # documented by torch, never made public

__all__ = [
    "FakeTensor",
    "FakeTensorMode",
    "TorchDispatchMode",
    "all_gather_single",
    "backend_all_to_all",
    "backend_reduce_scatter",
    "called_group",
    "chunks_on_demand",
    "fake_store",
    "process_group_name",
    "reduce_scatter_single",
    "scale_all",
    "storage_key",
    "unset_fake_temporarily",
    "watched_resizes",
    "written_tensors",
]


def process_group_name(group: dist.ProcessGroup) -> str:
    """The name under which torch registered the group.

    A process group written in Python holds no back end object that could keep the name (2.11, 2.13).
    """
    return str(dist.distributed_c10d._world.pg_names[group])


def backend_reduce_scatter(
    backend: Any, output: torch.Tensor, tensor: torch.Tensor, options: Any
) -> dist.Work:
    """``reduce_scatter_single`` of a back end object: private until it got its public name (after 2.13)."""
    call = getattr(backend, "reduce_scatter_single", None) or backend._reduce_scatter_base
    work: dist.Work = call(output, tensor, options)
    return work


def backend_all_to_all(
    backend: Any, output: torch.Tensor, tensor: torch.Tensor, output_sizes: list[int], input_sizes: list[int]
) -> dist.Work:
    """``all_to_all_single`` of a back end object: ``alltoall_base`` until 2.13."""
    call = getattr(backend, "all_to_all_single", None) or backend.alltoall_base
    work: dist.Work = call(output, tensor, output_sizes, input_sizes, dist.AllToAllOptions())
    return work


def all_gather_single(output: torch.Tensor, tensor: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Fills ``output`` with the ranks' equal tensors in order: ``all_gather_into_tensor`` until 2.13, deprecated since."""
    call = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    call(output, tensor, group=group)


def reduce_scatter_single(
    output: torch.Tensor, tensor: torch.Tensor, group: dist.ProcessGroup, *, async_op: bool = False
) -> dist.Work | None:
    """Sums the ranks' tensors and keeps this rank's part: ``reduce_scatter_tensor`` until 2.13, deprecated since."""
    call = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    work: dist.Work | None = call(output, tensor, group=group, async_op=async_op)
    return work


def scale_all(tensors: list[torch.Tensor], factor: float) -> None:
    """Multiplies every tensor in place, in few kernels; what ``torch.nn.utils.clip_grad_norm_`` calls (2.11 to 2.15)."""
    torch._foreach_mul_(tensors, factor)


def storage_key(tensor: torch.Tensor) -> int:
    """Names the storage of a tensor while it lives: the address of its C++ object, for on meta there are no data."""
    return int(tensor.untyped_storage()._cdata)


def written_tensors(operator: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The arguments that an ATen operator writes to, by its schema (2.11, 2.13)."""
    found = []
    for position, argument in enumerate(operator._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            found += [t for t in (given if isinstance(given, list | tuple) else [given]) if t is not None]
    return found


def fake_store() -> dist.Store:
    """The store of a world that is not there; making it registers the back end ``fake``, whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    return FakeStore()


def called_group(argument: Any) -> str:
    """The name of the group that a ``c10d`` operator was called with, which it sees as a script object."""
    group = argument if isinstance(argument, dist.ProcessGroup) else dist.ProcessGroup.unbox(argument)
    return str(group.group_name)


@contextmanager
def watched_resizes(note: Callable[[torch.UntypedStorage, int], None]) -> Iterator[None]:
    """Tells ``note`` of every storage that is given a new size, before it is: FSDP2 frees and refills parameters so, past dispatch."""
    resize = torch.UntypedStorage.resize_

    def watched(storage: torch.UntypedStorage, num_bytes: int) -> Any:
        note(storage, num_bytes)
        return resize(storage, num_bytes)

    torch.UntypedStorage.resize_ = watched  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]


@contextmanager
def chunks_on_demand() -> Iterator[None]:
    """Lets FSDP2 make of a parameter's chunks only those that it takes, this rank's and the first, not one for every rank: each fake tensor
    takes a tenth of a millisecond, and there may be thousands of ranks (2.11, 2.13)."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    chunk = getattr(_fsdp_param, "_chunk_with_empty", None)
    if chunk is None:  # a later torch makes them otherwise, and perhaps as many as before
        yield
        return
    _fsdp_param._chunk_with_empty = _Chunks  # type: ignore[assignment]  # made to be called as the function is
    try:
        yield
    finally:
        _fsdp_param._chunk_with_empty = chunk


class _Chunks(Sequence[torch.Tensor]):
    """What ``torch.chunk`` makes of a tensor, and empty tensors up to ``num_chunks``."""

    def __init__(self, tensor: torch.Tensor, num_chunks: int, dim: int) -> None:
        self._tensor = tensor
        self._dim = dim
        self._each = -(-tensor.size(dim) // num_chunks)
        self._num_chunks = num_chunks

    def __len__(self) -> int:
        return self._num_chunks

    @overload
    def __getitem__(self, index: int) -> torch.Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[torch.Tensor]: ...
    def __getitem__(self, index: int | slice) -> torch.Tensor | Sequence[torch.Tensor]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        if index >= len(self):
            raise IndexError(index)
        start, size = index * self._each, self._tensor.size(self._dim)
        if size and start >= size:
            return self._tensor.new_empty(0)
        return self._tensor.narrow(self._dim, start, min(self._each, size - start))
