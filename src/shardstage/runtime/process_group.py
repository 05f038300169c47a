"""The process group of CPU ranks: shared memory among the ranks of one host, gloo otherwise.

    register_backend()
    dist.init_process_group("shardstage", ...)

Every sub-group of ranks that share a host gets its own segments; a group that spans hosts uses gloo as a whole.

Over shared memory a collective is complete when the call returns, also with ``async_op=True``; the Work is already done.
So the ranks of a group must make its calls in the same order, and groups that have two ranks in common must be called
in compatible orders: rank 0 must not wait in group A for rank 1 while rank 1 waits in group B for rank 0. Sends are
different: ``isend`` returns at once, and unfinished sends move on during every later wait of the rank.

Use the groups of a process from one thread. What talks from a thread of its own, like ``dcp.async_save``, needs
``process_group=dist.new_group(backend="gloo")``.
"""

# torch declares two or three overloads for each of these methods; its own front end calls only one.
# mypy: disable-error-code="override, assignment"

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from shardstage import compat
from shardstage.errors import ProgramError
from shardstage.runtime.collectives import Collectives, CompletedWork, Pipes, Reduction
from shardstage.runtime.gloo_collectives import GlooCollectives
from shardstage.runtime.shared_collectives import SharedCollectives
from shardstage.runtime.shared_memory import Progress, SharedMemoryOptions, SharedSegments
from shardstage.runtime.shared_pipes import SharedPipes
from shardstage.runtime.shared_rendezvous import connect

__all__ = [
    "BACKEND",
    "CompletedWork",
    "Recorder",
    "ShardstageProcessGroup",
    "allocate_shared",
    "register_backend",
]

BACKEND = "shardstage"

Recorder = Callable[[str, "ShardstageProcessGroup", int], None]
"""Called as ``record(kind, group, num_bytes)`` before each collective, send and receive."""

_REDUCTIONS = {getattr(dist.ReduceOp, reduction.name): reduction for reduction in Reduction}


def register_backend(options: SharedMemoryOptions | None = None) -> None:
    """Makes ``"shardstage"`` a back end of ``torch.distributed`` for CPU tensors; again is harmless.

    ``options`` hold for groups created without ``pg_options``; those of the first call count.
    """
    if BACKEND in dist.Backend.backend_list:
        return
    progress = Progress()  # of this process: one wait moves the sends of all groups on

    def create(group_options: Any, pg_options: SharedMemoryOptions | None) -> ShardstageProcessGroup:
        return ShardstageProcessGroup(
            store=group_options.store,
            rank=group_options.group_rank,
            size=group_options.group_size,
            timeout=group_options.timeout,
            global_ranks=group_options.global_ranks_in_group,
            options=pg_options or options or SharedMemoryOptions(),
            progress=progress,
        )

    dist.Backend.register_backend(BACKEND, create, extended_api=True, devices=["cpu"])


def allocate_shared(numel: int, dtype: torch.dtype, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """A zeroed tensor [numel] whose collectives within ``group`` need no copy, nor do those of its contiguous slices.

    Every rank of the group must call it with the same size, in the same order. The memory lives as long as the group.
    On a group without shared memory it is an ordinary tensor.
    """
    group = dist.group.WORLD if group is None else group
    segments = group.segments if isinstance(group, ShardstageProcessGroup) else None
    if segments is None:
        return torch.zeros(numel, dtype=dtype)
    allocation = segments.allocate(numel * dtype.itemsize)
    return allocation.buffers[segments.rank].view(dtype)


class ShardstageProcessGroup(dist.ProcessGroup):
    """A group of CPU ranks. ``segments`` is None when it uses gloo; ``record`` may be set to a Recorder.

    Its methods are those that ``torch.distributed`` calls, in the names of torch 2.11 and of 2.13 and later.
    """

    def __init__(
        self,
        *,
        store: dist.Store,
        rank: int,
        size: int,
        timeout: timedelta,
        global_ranks: Sequence[int],
        options: SharedMemoryOptions,
        progress: Progress,
    ) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]  # a subclass in Python has no store of its own
        self.record: Recorder | None = None
        self.segments: SharedSegments | None = connect(
            store,
            rank=rank,
            size=size,
            labels=[f"rank {global_rank}" for global_rank in global_ranks or range(size)],
            options=options,
            timeout_s=timeout.total_seconds(),
            progress=progress,
        )
        self._collectives: Collectives
        self._pipes: Pipes
        if self.segments is None:
            self._collectives = self._pipes = GlooCollectives(store, rank, size, timeout)
        else:
            self._collectives = SharedCollectives(self.segments)
            self._pipes = SharedPipes(self.segments)

    def getBackendName(self) -> str:
        """The name under which the back end is registered."""
        return BACKEND

    @property
    def group_name(self) -> str:
        """The name under which torch knows this group."""
        return compat.process_group_name(self)

    pg_name = group_name

    def wrap_collectives(self, wrap: Callable[[Collectives], Collectives]) -> None:
        """Puts something between this group and what carries its collectives: to delay, to count or to break them."""
        self._collectives = wrap(self._collectives)

    def shutdown(self) -> None:
        """Leaves the group; peers that still wait for this rank get an error."""
        self._pipes.close()
        if self.segments is not None:
            self.segments.close()

    abort = shutdown

    def barrier(self, opts: Any = None) -> dist.Work:
        """Completes once every rank of the group has called it."""
        return self._run("barrier", [], [], lambda outputs, inputs: self._collectives.barrier())

    def allreduce(self, tensors: list[torch.Tensor], opts: Any = None) -> dist.Work:
        """Replaces each tensor by its reduction over the ranks."""
        reduction = _reduction(opts)

        def call(outputs: list[torch.Tensor], inputs: list[torch.Tensor]) -> dist.Work | None:
            return _last([self._collectives.all_reduce(output, reduction) for output in outputs])

        return self._run("all_reduce", tensors, [], call)

    allreduce_coalesced = allreduce

    def reduce(self, tensors: list[torch.Tensor], opts: Any) -> dist.Work:
        """Replaces the root's tensor by the reduction over the ranks."""
        reduction, root = _reduction(opts), opts.rootRank
        return self._run(
            "reduce", tensors, [], lambda out, _: self._collectives.reduce(out[0], reduction, root)
        )

    def broadcast(self, tensors: list[torch.Tensor], opts: Any) -> dist.Work:
        """Fills the tensor of every rank with the root's."""
        root = opts.rootRank
        return self._run("broadcast", tensors, [], lambda out, _: self._collectives.broadcast(out[0], root))

    def allgather(
        self, output_lists: list[list[torch.Tensor]], tensors: list[torch.Tensor], opts: Any = None
    ) -> dist.Work:
        """Fills ``output_lists[0][rank]`` with the tensor of that rank; sizes may differ by rank."""
        work = self._run(
            "all_gather", output_lists[0], tensors, lambda out, own: self._collectives.all_gather(out, own[0])
        )
        return _with_result(work, output_lists)

    def all_gather_single(self, output: torch.Tensor, tensor: torch.Tensor, opts: Any = None) -> dist.Work:
        """Fills ``output`` with the ranks' tensors in rank order."""
        return self._run(
            "all_gather",
            [output],
            [tensor],
            lambda out, own: self._collectives.all_gather_single(out[0], own[0]),
        )

    _allgather_base = all_gather_single

    def all_gather_single_coalesced(
        self, outputs: list[torch.Tensor], tensors: list[torch.Tensor], opts: Any = None
    ) -> dist.Work:
        """``all_gather_single`` of each pair."""
        works = [self.all_gather_single(*pair) for pair in zip(outputs, tensors, strict=True)]
        return _joined(works, outputs)

    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def allgather_coalesced(
        self, output_lists: list[list[torch.Tensor]], tensors: list[torch.Tensor], opts: Any = None
    ) -> dist.Work:
        """Fills ``output_lists[rank][i]`` with tensor i of that rank."""
        for index, tensor in enumerate(tensors):
            self.allgather([[outputs[index] for outputs in output_lists]], [tensor]).wait()
        return CompletedWork(output_lists)

    def gather(
        self, output_lists: list[list[torch.Tensor]], tensors: list[torch.Tensor], opts: Any
    ) -> dist.Work:
        """Fills the root's ``output_lists[0][rank]`` with the tensor of that rank."""
        root = opts.rootRank

        def call(outputs: list[torch.Tensor], inputs: list[torch.Tensor]) -> dist.Work | None:
            return self._collectives.gather(outputs if output_lists else None, inputs[0], root)

        return self._run("gather", output_lists[0] if output_lists else [], tensors, call)

    def scatter(
        self, outputs: list[torch.Tensor], input_lists: list[list[torch.Tensor]], opts: Any
    ) -> dist.Work:
        """Fills the output with the root's ``input_lists[0][my rank]``."""
        root = opts.rootRank

        def call(out: list[torch.Tensor], inputs: list[torch.Tensor]) -> dist.Work | None:
            return self._collectives.scatter(out[0], inputs if input_lists else None, root)

        return self._run("scatter", outputs, input_lists[0] if input_lists else [], call)

    def reduce_scatter(
        self, outputs: list[torch.Tensor], input_lists: list[list[torch.Tensor]], opts: Any = None
    ) -> dist.Work:
        """Fills the output with the reduction over ranks of ``input_lists[0][my rank]``; sizes may differ by rank."""
        reduction = _reduction(opts)

        def call(out: list[torch.Tensor], inputs: list[torch.Tensor]) -> dist.Work | None:
            return self._collectives.reduce_scatter(out[0], inputs, reduction)

        return self._run("reduce_scatter", outputs, input_lists[0], call)

    def reduce_scatter_single(
        self, output: torch.Tensor, tensor: torch.Tensor, opts: Any = None
    ) -> dist.Work:
        """Fills ``output`` with my part of the reduction over the ranks' tensors."""
        reduction = _reduction(opts)

        def call(out: list[torch.Tensor], inputs: list[torch.Tensor]) -> dist.Work | None:
            return self._collectives.reduce_scatter_single(out[0], inputs[0], reduction)

        return self._run("reduce_scatter", [output], [tensor], call)

    _reduce_scatter_base = reduce_scatter_single

    def reduce_scatter_single_coalesced(
        self, outputs: list[torch.Tensor], tensors: list[torch.Tensor], opts: Any = None
    ) -> dist.Work:
        """``reduce_scatter_single`` of each pair."""
        works = [self.reduce_scatter_single(*pair, opts) for pair in zip(outputs, tensors, strict=True)]
        return _joined(works, outputs)

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def alltoall(
        self, outputs: list[torch.Tensor], tensors: list[torch.Tensor], opts: Any = None
    ) -> dist.Work:
        """Fills ``outputs[rank]`` with that rank's ``tensors[my rank]``; sizes may differ by pair."""
        return self._run(
            "all_to_all", outputs, tensors, lambda out, own: self._collectives.all_to_all(out, own)
        )

    def all_to_all_single(
        self,
        output: torch.Tensor,
        tensor: torch.Tensor,
        output_split_sizes: list[int],
        input_split_sizes: list[int],
        opts: Any = None,
    ) -> dist.Work:
        """``alltoall`` of runs of rows; no split sizes means equal runs."""

        def call(out: list[torch.Tensor], own: list[torch.Tensor]) -> dist.Work | None:
            return self._collectives.all_to_all(
                torch.split(out[0], _run_lengths(output, output_split_sizes, self.size())),
                torch.split(own[0], _run_lengths(tensor, input_split_sizes, self.size())),
            )

        return self._run("all_to_all", [output], [tensor], call)

    alltoall_base = all_to_all_single

    def send(self, tensors: list[torch.Tensor], destination: int, tag: int) -> dist.Work:
        """Sends the tensor; it must not change before the Work is done."""
        return self._run("send", [], tensors, lambda _, own: self._pipes.send(own[0], destination, tag))

    def recv(self, tensors: list[torch.Tensor], source: int, tag: int) -> dist.Work:
        """Fills the tensor with the next message of ``source`` that has this tag."""
        return self._receive(tensors[0], source, tag)

    def recv_anysource(self, tensors: list[torch.Tensor], tag: int) -> dist.Work:
        """Fills the tensor with the next message of any rank that has this tag."""
        return self._receive(tensors[0], None, tag)

    def _receive(self, tensor: torch.Tensor, source: int | None, tag: int) -> dist.Work:
        if not tensor.is_contiguous():
            raise ProgramError(
                f"a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} cannot receive a message",
                hint="receive into tensor.contiguous() and copy it",
            )
        return self._run("receive", [tensor], [], lambda out, _: self._pipes.receive(out[0], source, tag))

    def _run(
        self,
        kind: str,
        outputs: list[torch.Tensor],
        inputs: list[torch.Tensor],
        call: Callable[[list[torch.Tensor], list[torch.Tensor]], dist.Work | None],
    ) -> dist.Work:
        """The one place that every collective, send and receive passes: flattens, records, calls, copies back."""
        flat_outputs = [_flat(tensor) for tensor in outputs]
        flat_inputs = [_flat(tensor) for tensor in inputs]
        if self.record is not None:
            self.record(kind, self, sum(tensor.nbytes for tensor in flat_inputs or flat_outputs))
        work = call(flat_outputs, flat_inputs)
        for tensor, flat in zip(outputs, flat_outputs, strict=True):
            if not tensor.is_contiguous():
                if work is not None:
                    work.wait()
                tensor.data.copy_(flat.view(tensor.shape))
        return CompletedWork(outputs) if work is None else work


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """The elements [N]: an alias if contiguous, else a copy.

    ``.data``, because a collective is not an in-place operation to autograd: gloo and NCCL leave the version as it is.
    """
    if not tensor.is_cpu:
        raise ProgramError(
            f"the {BACKEND} back end carries CPU tensors, not {tensor.device.type}",
            hint='dist.init_process_group("nccl")',
        )
    data = tensor.data
    return data if data.dim() == 1 and data.is_contiguous() else data.reshape(-1)


def _reduction(opts: Any) -> Reduction:
    if opts is None:
        return Reduction.SUM
    operator = opts.reduceOp.op
    reduction = _REDUCTIONS.get(operator)
    if reduction is None:
        raise ProgramError(
            f"ReduceOp.{operator.name} is not available on the {BACKEND} back end",
            hint="scale the tensor, then use ReduceOp.SUM",
        )
    return reduction


def _run_lengths(tensor: torch.Tensor, split_sizes: list[int], size: int) -> list[int]:
    """Elements of the run of rows for each rank."""
    if not split_sizes:
        split_sizes = [tensor.shape[0] // size] * size
    row = tensor.numel() // max(tensor.shape[0], 1)
    if sum(split_sizes) * row != tensor.numel():
        raise ProgramError(
            f"{tensor.shape[0]} rows cannot be split over the {size} ranks as {split_sizes}",
            hint="pass split sizes that add up to the rows",
        )
    return [rows * row for rows in split_sizes]


def _last(works: list[dist.Work | None]) -> dist.Work | None:
    """The Work of a run of calls: gloo completes them in order of the calls, shared memory at once."""
    for work in works[:-1]:
        if work is not None:
            work.wait()
    return works[-1] if works else None


def _joined(works: list[dist.Work], outputs: list[torch.Tensor]) -> dist.Work:
    for work in works:
        work.wait()
    return CompletedWork(outputs)


def _with_result(work: dist.Work, outputs: list[Any]) -> dist.Work:
    return CompletedWork(outputs) if isinstance(work, CompletedWork) else work
