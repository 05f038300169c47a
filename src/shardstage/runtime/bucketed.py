"""Parameters replicated over dp: flat buckets, reduced under the last backward; ZeRO-1 shards what the optimizer keeps.

parameters of a bucket   | p0 | p1    | p2  |pad|      flat_parameters: what blocks read (views of it)
gradients                | g0 | g1    | g2  |pad|      flat_gradients: accumulated over microbatches
dp ranks (ZeRO-1)        |  rank 0  |  rank 1   |      each updates its part, then all gather the parameters
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardstage.compat import all_gather_single, reduce_scatter_single
from shardstage.layout import Replicate, Shard
from shardstage.runtime.groups import RankGroups
from shardstage.runtime.leaves import Leaf, ParameterInfo, Piece
from shardstage.runtime.stage import Stage

__all__ = ["BucketedParameters"]

Allocate = Callable[[int, torch.dtype], Tensor]


class _Kind(NamedTuple):
    """Parameters share a bucket only if their gradients take the same way: decayed?, sharded over tp?, partial over tp?, tied with?"""

    is_decayed: bool
    is_tp_sharded: bool
    is_tp_partial: bool
    tied_stages: tuple[int, ...]


@dataclass(kw_only=True, eq=False)
class _Bucket:
    kind: _Kind
    infos: tuple[ParameterInfo, ...]
    parameters: tuple[nn.Parameter, ...]
    offsets: tuple[int, ...]
    flat_parameters: Tensor
    flat_gradients: Tensor
    master: Tensor
    shard_gradients: Tensor
    views: tuple[Tensor, ...]
    pending: int = 0
    touched: set[int] = field(default_factory=set)
    work: dist.Work | None = None
    is_started: bool = False


class BucketedParameters:
    """Owns the parameters of one stage, their gradients, and how both meet over dp (ZeRO 0 and 1), tp and ties.

    A step: ``begin``, then backwards (the last one after ``expect_last_backward``), ``finish`` waits for the reductions, the optimizer
    steps ``leaves``, ``publish`` makes the new parameters visible to the blocks on all ranks. Gradients are *summed* over dp.
    """

    def __init__(
        self,
        stage: Stage,
        groups: RankGroups,
        *,
        zero: int,
        bucket_bytes: int,
        device: torch.device,
        master_dtype: torch.dtype,
        allocate: Allocate,
    ) -> None:
        self._groups = groups
        self._is_sharded = zero >= 1 and groups.mesh.dp > 1
        self._is_last = False
        held = stage.parameters_by_name()
        self._alone = {
            name: _materialise(held[name], device)
            for name, info in stage.infos.items()
            if self._is_alone(_kind(info), held[name][1], master_dtype)
        }
        self._buckets = [
            self._make_bucket(stage, kind, infos, device=device, master_dtype=master_dtype, allocate=allocate)
            for kind, infos in _assign(stage, bucket_bytes, without=self._alone)
        ]
        self._next_to_start = 0
        for bucket in self._buckets:
            for index, parameter in enumerate(bucket.parameters):
                parameter.register_post_accumulate_grad_hook(self._hook(bucket, index))  # type: ignore[no-untyped-call]  # torch's is untyped
        self.leaves: tuple[Leaf, ...] = (
            *(self._leaf_alone(stage.infos[name], p) for name, p in self._alone.items() if p.requires_grad),
            *(self._leaf(bucket) for bucket in self._buckets),
        )

    def begin(self) -> None:
        """Forgets the gradients of the step before."""
        self._is_last = False
        self._next_to_start = 0
        for parameter in self._alone.values():
            parameter.grad = None
        for bucket in self._buckets:
            bucket.touched.clear()
            bucket.pending = len(bucket.parameters)
            bucket.is_started = False

    def expect_last_backward(self) -> None:
        """Reduces each bucket as soon as the backward that now begins has filled it."""
        self._is_last = True

    def finish(self) -> None:
        """Returns when every gradient is reduced: summed over dp, and over tp and tied stages where it was partial."""
        while self._next_to_start < len(self._buckets):
            self._start(self._buckets[self._next_to_start])
            self._next_to_start += 1
        for bucket in self._buckets:
            if bucket.work is not None:
                bucket.work.wait()
                bucket.work = None
            self._reduce_over_model(bucket)

    def publish(self) -> None:
        """Copies the masters back to what the blocks read; under ZeRO-1 each rank sends its part to all."""
        for bucket in self._buckets:
            own = self._own_range(bucket)
            part = bucket.flat_parameters[own.start : own.stop]
            if bucket.master.data_ptr() != part.data_ptr():
                part.copy_(bucket.master)
            if self._is_sharded:
                _all_gather_flat(bucket.flat_parameters, part, self._groups.dp_group)

    def assign(self, name: str, local: Tensor) -> None:
        """Gives a parameter its value: ``local`` is this rank's tensor-parallel shard."""
        if name in self._alone:
            self._alone[name].copy_(local)
            return
        for bucket in self._buckets:
            for info, offset in zip(bucket.infos, bucket.offsets, strict=True):
                if info.name == name:
                    _write(bucket.flat_parameters, offset, local)
                    own = self._own_range(bucket)
                    if bucket.master.data_ptr() != bucket.flat_parameters[own.start : own.stop].data_ptr():
                        start, stop = max(own.start, offset), min(own.stop, offset + local.numel())
                        if start < stop:
                            bucket.master[start - own.start : stop - own.start].copy_(
                                local.reshape(-1)[start - offset : stop - offset]
                            )

    def _is_alone(self, kind: _Kind, parameter: nn.Parameter, master_dtype: torch.dtype) -> bool:
        """Whether no other rank needs its gradient: autograd then accumulates in place, and nothing is copied to a bucket."""
        if not parameter.requires_grad:
            return True
        is_shared = self._groups.mesh.dp > 1 or kind.is_tp_partial or bool(kind.tied_stages)
        return not is_shared and parameter.dtype == master_dtype

    def _leaf_alone(self, info: ParameterInfo, parameter: nn.Parameter) -> Leaf:
        return Leaf(
            master=parameter,
            gradient=lambda: parameter.grad,
            pieces=(Piece(parameter=info, flat_start=0, flat_stop=parameter.numel(), offset=0),),
            is_decayed=info.is_decayed,
            is_counted=isinstance(info.placement, Shard) or self._groups.tp == 0,
            owns_gradient=True,
        )

    def _make_bucket(
        self,
        stage: Stage,
        kind: _Kind,
        infos: tuple[ParameterInfo, ...],
        *,
        device: torch.device,
        master_dtype: torch.dtype,
        allocate: Allocate,
    ) -> _Bucket:
        held = stage.parameters_by_name()
        ranks = self._groups.mesh.dp if self._is_sharded else 1
        offsets, used = _pack(infos)
        numel = -(-used // ranks) * ranks
        dtype = held[infos[0].name][1].dtype
        flat_parameters = allocate(numel, dtype).zero_()
        flat_gradients = allocate(numel, master_dtype).zero_()
        parameters = tuple(
            _become_view(held[info.name], flat_parameters, offset)
            for info, offset in zip(infos, offsets, strict=True)
        )
        part = self._part(numel)
        is_same = dtype == master_dtype
        own = flat_parameters[part.start : part.stop]
        return _Bucket(
            kind=kind,
            infos=infos,
            parameters=parameters,
            offsets=offsets,
            flat_parameters=flat_parameters,
            flat_gradients=flat_gradients,
            master=own if is_same else torch.zeros(len(part), dtype=master_dtype, device=device),
            shard_gradients=torch.zeros(len(part), dtype=master_dtype, device=device)
            if self._is_sharded
            else flat_gradients,
            views=tuple(
                flat_gradients[offset : offset + p.numel()].view(p.shape)
                for p, offset in zip(parameters, offsets, strict=True)
            ),
            pending=len(infos),
        )

    def _hook(self, bucket: _Bucket, index: int) -> Callable[[Tensor], None]:
        view = bucket.views[index]

        def take(parameter: Tensor) -> None:
            gradient = parameter.grad
            assert gradient is not None
            if index in bucket.touched:
                view.add_(gradient)
            else:
                view.copy_(gradient)
                bucket.touched.add(index)
            parameter.grad = None
            if self._is_last:
                bucket.pending -= 1
                self._start_complete()

        return take

    def _start_complete(self) -> None:
        """Starts buckets strictly in order: every dp rank then runs the same sequence of collectives."""
        while self._next_to_start < len(self._buckets) and self._buckets[self._next_to_start].pending == 0:
            self._start(self._buckets[self._next_to_start])
            self._next_to_start += 1

    def _start(self, bucket: _Bucket) -> None:
        for index, view in enumerate(bucket.views):
            if index not in bucket.touched:
                view.zero_()
        bucket.is_started = True
        group = self._groups.dp_group
        if group is None:
            return
        if self._is_sharded:
            bucket.work = reduce_scatter_single(
                bucket.shard_gradients, bucket.flat_gradients, group, async_op=True
            )
        else:
            bucket.work = dist.all_reduce(bucket.flat_gradients, group=group, async_op=True)

    def _reduce_over_model(self, bucket: _Bucket) -> None:
        if bucket.kind.is_tp_partial and self._groups.tp_group is not None:
            dist.all_reduce(bucket.shard_gradients, group=self._groups.tp_group)
        if bucket.kind.tied_stages:
            dist.all_reduce(bucket.shard_gradients, group=self._groups.tie_groups[bucket.kind.tied_stages])

    def _leaf(self, bucket: _Bucket) -> Leaf:
        own = self._own_range(bucket)
        groups = self._groups
        holds_first_copy = (
            (self._is_sharded or groups.dp == 0)
            and (bucket.kind.is_tp_sharded or groups.tp == 0)
            and (not bucket.kind.tied_stages or groups.pp == bucket.kind.tied_stages[0])
        )
        return Leaf(
            master=bucket.master,
            gradient=lambda: bucket.shard_gradients,
            pieces=tuple(_pieces(bucket.infos, bucket.offsets, own)),
            is_decayed=bucket.kind.is_decayed,
            is_counted=holds_first_copy,
        )

    def _own_range(self, bucket: _Bucket) -> range:
        return self._part(bucket.flat_parameters.numel())

    def _part(self, numel: int) -> range:
        if not self._is_sharded:
            return range(numel)
        size = numel // self._groups.mesh.dp
        return range(self._groups.dp * size, (self._groups.dp + 1) * size)


def _assign(
    stage: Stage, bucket_bytes: int, *, without: Container[str]
) -> Iterator[tuple[_Kind, tuple[ParameterInfo, ...]]]:
    """Parameters in the order in which backward finishes them, cut into buckets of one kind and at most ``bucket_bytes``.

    What several blocks of the stage use is finished last. A parameter that is tied across stages has a bucket of its
    own, so that its flat shards lie alike on all of them.
    """
    held = stage.parameters_by_name()
    order = [name for name in reversed(held) if name not in without]
    filling: dict[_Kind, list[ParameterInfo]] = {}
    filled_bytes: dict[_Kind, int] = {}
    for name in order:
        info, parameter = stage.infos[name], held[name][1]
        kind = _kind(info)
        num_bytes = parameter.numel() * parameter.element_size()
        if kind in filling and (kind.tied_stages or filled_bytes[kind] + num_bytes > bucket_bytes):
            yield kind, tuple(filling.pop(kind))
        filling.setdefault(kind, []).append(info)
        filled_bytes[kind] = num_bytes + (filled_bytes[kind] if len(filling[kind]) > 1 else 0)
    for kind, infos in filling.items():
        yield kind, tuple(infos)


def _kind(info: ParameterInfo) -> _Kind:
    return _Kind(
        is_decayed=info.is_decayed,
        is_tp_sharded=isinstance(info.placement, Shard),
        is_tp_partial=isinstance(info.placement, Replicate) and info.placement.has_partial_grad,
        tied_stages=info.stages if len(info.stages) > 1 else (),
    )


def _pack(infos: Sequence[ParameterInfo]) -> tuple[tuple[int, ...], int]:
    offsets, used = [], 0
    for info in infos:
        offsets.append(used)
        used += _numel(info)
    return tuple(offsets), used


def _numel(info: ParameterInfo) -> int:
    return int(torch.Size(info.local_shape).numel())


def _materialise(held: tuple[nn.Module, nn.Parameter], device: torch.device) -> nn.Parameter:
    module, old = held
    return _replace(module, old, torch.empty(old.shape, dtype=old.dtype, device=device))


def _become_view(held: tuple[nn.Module, nn.Parameter], flat: Tensor, offset: int) -> nn.Parameter:
    """Puts the module's parameter into the flat buffer; it stays the same parameter by name."""
    module, old = held
    return _replace(module, old, flat[offset : offset + old.numel()].view(old.shape))


def _replace(module: nn.Module, old: nn.Parameter, tensor: Tensor) -> nn.Parameter:
    """Puts ``tensor`` in the place of a parameter of the module, under its name."""
    parameter = nn.Parameter(tensor, requires_grad=old.requires_grad)
    name = next(name for name, p in module._parameters.items() if p is old)
    module._parameters[name] = parameter
    return parameter


def _pieces(infos: Sequence[ParameterInfo], offsets: Sequence[int], own: range) -> Iterator[Piece]:
    for info, offset in zip(infos, offsets, strict=True):
        start, stop = max(own.start, offset), min(own.stop, offset + _numel(info))
        if start < stop:
            yield Piece(
                parameter=info, flat_start=start - offset, flat_stop=stop - offset, offset=start - own.start
            )


def _write(flat: Tensor, offset: int, local: Tensor) -> None:
    flat[offset : offset + local.numel()].copy_(local.reshape(-1))


def _all_gather_flat(flat: Tensor, part: Tensor, group: dist.ProcessGroup | None) -> None:
    assert group is not None
    all_gather_single(flat, part.clone(), group)
