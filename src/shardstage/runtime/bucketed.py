"""Parameters replicated over dp: flat buckets, reduced under the last backward; ZeRO-1 shards what the optimizer keeps.

parameters of a bucket   | p0 | p1    | p2  |pad|      flat_parameters: what blocks read (views of it)
gradients                | g0 | g1    | g2  |pad|      flat_gradients: accumulated over microbatches
dp ranks (ZeRO-1)        |  rank 0  |  rank 1   |      each updates its part, then all gather the parameters
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardstage.compat import all_gather_single, reduce_scatter_single
from shardstage.layout import Shard
from shardstage.runtime.groups import RankGroups
from shardstage.runtime.leaves import Leaf, ParameterInfo, Piece
from shardstage.runtime.stage import Stage
from shardstage.runtime.storage import Storage

__all__ = ["BucketedParameters"]

Allocate = Callable[[int, torch.dtype], Tensor]
Place = tuple[nn.Module, nn.Parameter]


@dataclass(kw_only=True, eq=False)
class _Bucket:
    stage: int | None  # whose last backward fills it; None where several stages of the rank do
    infos: tuple[ParameterInfo, ...]
    parameters: tuple[nn.Parameter, ...]
    offsets: tuple[int, ...]
    flat_parameters: Tensor
    flat_gradients: Tensor
    has_own_master: bool  # else a part of flat_parameters
    master: Tensor
    shard_gradients: Tensor
    views: tuple[Tensor, ...]
    num_summands: int
    pending: int = 0
    touched: set[int] = field(default_factory=set)
    work: dist.Work | None = None
    is_started: bool = False


class BucketedParameters:
    """Owns the parameters of a rank's stages, their gradients, and how both meet over dp (ZeRO 0 and 1), tp and ties.

    A step: ``begin``, then backwards (a stage's last one after ``expect_last_backward``), ``finish`` waits for the reductions, the
    optimizer steps ``leaves``, ``publish`` makes the new parameters visible to the blocks on all ranks. Gradients are *summed* over dp.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        buckets: Sequence[Sequence[str]],
        groups: RankGroups,
        *,
        zero: int,
        storage: Storage,
        allocate: Allocate,
    ) -> None:
        """``stages`` are all of the rank, ``buckets`` names of parameters; a parameter in none of them concerns no other rank."""
        self._groups = groups
        self._storage = storage
        self._is_sharded = zero >= 1 and groups.mesh.dp > 1
        self._ended: set[int] = set()
        self._places: dict[str, list[Place]] = {}
        infos: dict[str, ParameterInfo] = {}
        for stage in stages:
            infos |= stage.infos
            for name, place in stage.parameters_by_name().items():
                self._places.setdefault(name, []).append(place)
        in_buckets = {name for bucket in buckets for name in bucket}
        self._alone = {
            name: _replace(
                places, torch.empty(places[0][1].shape, dtype=places[0][1].dtype, device=storage.device)
            )
            for name, places in self._places.items()
            if name not in in_buckets
        }
        self._stage_of = {
            name: stage.index if len(self._places[name]) == 1 else None
            for stage in stages
            for name in stage.infos
        }
        self._num_summands = {name: stage.num_summands(name) for stage in stages for name in stage.infos}
        self._masters_alone = {
            name: storage.new_master(p.shape)
            for name, p in self._alone.items()
            if p.requires_grad and storage.needs_master(p.dtype)
        }
        self._buckets = [self._make_bucket([infos[n] for n in names], allocate) for names in buckets]
        self._next_to_start = 0
        self._homes: dict[int, tuple[_Bucket, int]] = {}
        for bucket in self._buckets:
            for index, parameter in enumerate(bucket.parameters):
                self._homes[id(parameter)] = (bucket, index)
                parameter.register_post_accumulate_grad_hook(self._hook(bucket, index))  # type: ignore[no-untyped-call]  # torch's is untyped
        self._leaves_alone = [
            self._leaf_alone(infos[name], p) for name, p in self._alone.items() if p.requires_grad
        ]
        self.leaves: tuple[Leaf, ...] = (
            *self._leaves_alone,
            *(self._leaf(bucket) for bucket in self._buckets),
        )

    def begin(self) -> None:
        """Forgets the gradients of the step before."""
        self._ended.clear()
        self._next_to_start = 0
        for parameter in self._alone.values():
            parameter.grad = None
        for bucket in self._buckets:
            bucket.touched.clear()
            bucket.pending = bucket.num_summands
            bucket.is_started = False

    def unshard(self, stage: int) -> None:
        """Nothing: parameters are whole."""

    def reshard(self, stage: int) -> None:
        """Nothing: parameters stay whole."""

    def expect_last_backward(self, stage: int) -> None:
        """Reduces each bucket of a stage as soon as its backward that now begins has filled it."""
        self._ended.add(stage)

    def complete(self, stage: int) -> None:
        """Reduces what of a stage is left: its last backward has run."""
        for bucket in self._buckets:
            if bucket.stage == stage:
                bucket.pending = 0
        self._start_complete()

    def accumulate(self, weight: Tensor, left: Tensor, right: Tensor) -> None:
        """Adds ``left @ right`` to a parameter's gradient where that lies."""
        home = self._homes.get(id(weight))
        if home is None:
            if weight.grad is None:
                weight.grad = left @ right
            else:
                weight.grad.addmm_(left, right)
            return
        bucket, index = home
        view = bucket.views[index]
        is_first = index not in bucket.touched
        if view.dtype != left.dtype:
            product = left @ right
            view.copy_(product) if is_first else view.add_(product)
        elif is_first:
            torch.mm(left, right, out=view)
        else:
            view.addmm_(left, right)
        bucket.touched.add(index)
        self._note_summand(bucket)

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
        for name, master in self._masters_alone.items():
            self._alone[name].detach().copy_(master)
        for bucket in self._buckets:
            own = self._own_range(bucket)
            part = bucket.flat_parameters[own.start : own.stop]
            if bucket.has_own_master:
                part.copy_(bucket.master)
            if self._is_sharded:
                _all_gather_flat(bucket.flat_parameters, part, self._groups.dp_group)

    def assign(self, name: str, local: Tensor) -> None:
        """Gives a parameter its value: ``local`` is this rank's tensor-parallel shard."""
        if name in self._alone:
            self._alone[name].copy_(local)
            if name in self._masters_alone:
                self._masters_alone[name].copy_(local)
            return
        for bucket in self._buckets:
            for info, offset in zip(bucket.infos, bucket.offsets, strict=True):
                if info.name == name:
                    _write(bucket.flat_parameters, offset, local)
                    own = self._own_range(bucket)
                    if bucket.has_own_master:
                        start, stop = max(own.start, offset), min(own.stop, offset + local.numel())
                        if start < stop:
                            bucket.master[start - own.start : stop - own.start].copy_(
                                local.reshape(-1)[start - offset : stop - offset]
                            )

    def pieces_of(self, dp: int) -> tuple[Piece, ...]:
        """What data-parallel rank ``dp`` keeps of the trained parameters of these stages."""
        alone = (leaf.pieces for leaf in self._leaves_alone)
        shared = (
            _pieces(b.infos, b.offsets, self._part(b.flat_parameters.numel(), dp)) for b in self._buckets
        )
        return tuple(chain.from_iterable((*alone, *shared)))

    def held(self) -> dict[str, list[Tensor]]:
        """What is kept between steps, by category of memory."""
        buckets = self._buckets
        return {
            "parameters": [*self._alone.values(), *(bucket.flat_parameters for bucket in buckets)],
            "master": [
                *self._masters_alone.values(),
                *(bucket.master for bucket in buckets if bucket.has_own_master),
            ],
            "gradients": [t for bucket in buckets for t in (bucket.flat_gradients, bucket.shard_gradients)],
        }

    def _leaf_alone(self, info: ParameterInfo, parameter: nn.Parameter) -> Leaf:
        master = self._masters_alone.get(info.name)
        return Leaf(
            master=parameter if master is None else master,
            gradient=lambda: parameter.grad,
            pieces=(Piece(parameter=info, flat_start=0, flat_stop=parameter.numel(), offset=0),),
            is_decayed=info.is_decayed,
            is_counted=isinstance(info.placement, Shard) or self._groups.tp == 0,
            owns_gradient=master is None,
            is_apart=master is not None,
            is_sent=self._storage.is_offloaded,
        )

    def _make_bucket(self, infos: Sequence[ParameterInfo], allocate: Allocate) -> _Bucket:
        storage = self._storage
        ranks = self._groups.mesh.dp if self._is_sharded else 1
        offsets, used = _pack(infos)
        numel = -(-used // ranks) * ranks
        dtype = self._places[infos[0].name][0][1].dtype
        flat_parameters = allocate(numel, dtype).zero_()
        flat_gradients = allocate(numel, storage.gradient_dtype).zero_()
        parameters = tuple(
            _become_view(self._places[info.name], flat_parameters, offset)
            for info, offset in zip(infos, offsets, strict=True)
        )
        part = self._part(numel, self._groups.dp)
        has_own_master = storage.needs_master(dtype)
        own = flat_parameters[part.start : part.stop]
        return _Bucket(
            stage=self._stage_of[infos[0].name],
            infos=tuple(infos),
            parameters=parameters,
            offsets=offsets,
            flat_parameters=flat_parameters,
            flat_gradients=flat_gradients,
            has_own_master=has_own_master,
            master=storage.new_master([len(part)]) if has_own_master else own,
            shard_gradients=torch.zeros(len(part), dtype=storage.gradient_dtype, device=storage.device)
            if self._is_sharded
            else flat_gradients,
            views=tuple(
                flat_gradients[offset : offset + p.numel()].view(p.shape)
                for p, offset in zip(parameters, offsets, strict=True)
            ),
            num_summands=sum(self._num_summands[info.name] for info in infos),
        )

    def _hook(self, bucket: _Bucket, index: int) -> Callable[[Tensor], None]:
        view = bucket.views[index]

        def take(parameter: Tensor) -> None:
            gradient = parameter.grad
            if (
                gradient is None
            ):  # also called where an operator gave autograd nothing, because it went to ``accumulate``
                return
            if index in bucket.touched:
                view.add_(gradient)
            else:
                view.copy_(gradient)
                bucket.touched.add(index)
            parameter.grad = None
            self._note_summand(bucket)

        return take

    def _note_summand(self, bucket: _Bucket) -> None:
        """Counts what a stage's last backward adds; what several stages use is not waited for but started at the end."""
        if bucket.stage in self._ended:
            bucket.pending -= 1
            self._start_complete()

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
        first = bucket.infos[0]
        if first.is_tp_partial and self._groups.tp_group is not None:
            dist.all_reduce(bucket.shard_gradients, group=self._groups.tp_group)
        if first.ties:
            dist.all_reduce(bucket.shard_gradients, group=self._groups.tie_groups[first.ties])

    def _leaf(self, bucket: _Bucket) -> Leaf:
        own = self._own_range(bucket)
        groups, first = self._groups, bucket.infos[0]
        holds_first_copy = (
            (self._is_sharded or groups.dp == 0)
            and (isinstance(first.placement, Shard) or groups.tp == 0)
            and (not first.ties or groups.pp == first.ties[0])
        )
        return Leaf(
            master=bucket.master,
            gradient=lambda: bucket.shard_gradients,
            pieces=tuple(_pieces(bucket.infos, bucket.offsets, own)),
            is_decayed=first.is_decayed,
            is_counted=holds_first_copy,
            is_apart=self._storage.has_apart_gradients,
            is_sent=self._storage.is_offloaded,
        )

    def _own_range(self, bucket: _Bucket) -> range:
        return self._part(bucket.flat_parameters.numel(), self._groups.dp)

    def _part(self, numel: int, dp: int) -> range:
        if not self._is_sharded:
            return range(numel)
        size = numel // self._groups.mesh.dp
        return range(dp * size, (dp + 1) * size)


def _pack(infos: Sequence[ParameterInfo]) -> tuple[tuple[int, ...], int]:
    offsets, used = [], 0
    for info in infos:
        offsets.append(used)
        used += _numel(info)
    return tuple(offsets), used


def _numel(info: ParameterInfo) -> int:
    return int(torch.Size(info.local_shape).numel())


def _become_view(places: Sequence[Place], flat: Tensor, offset: int) -> nn.Parameter:
    """Puts a parameter into the flat buffer; it stays the same parameter by name."""
    old = places[0][1]
    return _replace(places, flat[offset : offset + old.numel()].view(old.shape))


def _replace(places: Sequence[Place], tensor: Tensor) -> nn.Parameter:
    """Puts ``tensor`` in the place of a parameter, under its name, in all modules that hold it."""
    parameter = nn.Parameter(tensor, requires_grad=places[0][1].requires_grad)
    for module, old in places:
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
