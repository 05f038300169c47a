"""Parameters sharded over dp by FSDP2 (ZeRO-2 and ZeRO-3), block by block."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from shardstage.compat import unset_fake_temporarily
from shardstage.layout import Shard
from shardstage.program.stage_parameters import row_range
from shardstage.runtime.groups import RankGroups
from shardstage.runtime.leaves import Leaf, ParameterInfo, Piece
from shardstage.runtime.stage import Stage
from shardstage.runtime.storage import Storage

__all__ = ["FullyShardedParameters"]


class FullyShardedParameters:
    """Owns the parameters of a rank's stages as row shards over dp; the same verbs as ``BucketedParameters``.

    FSDP2 unshards a block before it runs and reduce-scatters its gradients after each backward; ZeRO-3 also reshards after forward.
    It gives gradients the dtype of the rows that it shards: rows are stored in that of gradients, and have masters apart where that is
    narrower than the optimizer's, or where the optimizer is offloaded.
    The optimizer steps the local rows as plain tensors: DTensor's dispatch would cost more than the update of a small one.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        groups: RankGroups,
        *,
        zero: int,
        storage: Storage,
    ) -> None:
        assert groups.dp_group is not None
        self._groups = groups
        self._storage = storage
        with unset_fake_temporarily():  # a mesh reads its ranks out of a tensor
            mesh = DeviceMesh.from_group(groups.dp_group, storage.device.type, mesh_dim_names=("dp",))
        compute, stored = storage.compute_dtype, storage.gradient_dtype
        policy = (
            MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=stored, cast_forward_inputs=False)
            if compute != stored
            else MixedPrecisionPolicy()
        )
        # FSDP2 warns of outputs that are views, lest somebody change them in place: blocks do not.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        self._kept_whole: dict[int, list[FSDPModule]] = {}
        for stage in stages:
            self._kept_whole[stage.index] = _shard_stage(stage, mesh, policy, keeps_blocks=zero < 3)
            for module in (stage, *stage.blocks):
                _materialise(module, storage.device)
        self._infos = {name: info for stage in stages for name, info in stage.infos.items()}
        self._parameters = {
            name: cast("DTensor", held[1])
            for stage in stages
            for name, held in stage.parameters_by_name().items()
        }
        self._masters = {
            name: storage.new_master(parameter.to_local().shape)
            for name, parameter in self._parameters.items()
            if parameter.requires_grad and storage.needs_master(stored)
        }
        self.leaves: tuple[Leaf, ...] = tuple(
            self._leaf(self._infos[name], parameter)
            for name, parameter in self._parameters.items()
            if parameter.requires_grad
        )

    accumulate = None
    """FSDP2 takes gradients from autograd."""

    def unshard(self, stage: int) -> None:
        """Gathers what stays whole through the step: all blocks under ZeRO-2, under ZeRO-3 what several blocks use."""
        for module in self._kept_whole[stage]:
            module.unshard()

    def reshard(self, stage: int) -> None:
        """Frees what ``unshard`` gathered."""
        for module in self._kept_whole[stage]:
            module.reshard()

    def begin(self) -> None:
        """Forgets the gradients of the step before."""
        for parameter in self._parameters.values():
            parameter.grad = None

    def expect_last_backward(self, stage: int) -> None:
        """Nothing: FSDP2 reduces after every backward."""

    def complete(self, stage: int) -> None:
        """Nothing: it is done."""

    def finish(self) -> None:
        """Sums over tp and tied stages what is partial there; over dp it is done."""
        for kind_group, leaves in self._model_reductions():
            gradients = [g for leaf in leaves if (g := leaf.gradient()) is not None]
            if gradients:
                flat = torch.cat([g.reshape(-1) for g in gradients])
                dist.all_reduce(flat, group=kind_group)
                for gradient, part in zip(
                    gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True
                ):
                    gradient.copy_(part.view_as(gradient))

    def publish(self) -> None:
        """Copies masters that lie apart back to the rows, which blocks gather at their next unshard."""
        for name, master in self._masters.items():
            self._parameters[name].to_local().detach().copy_(master)

    def assign(self, name: str, local: Tensor) -> None:
        """Gives a parameter its value: ``local`` is this rank's tensor-parallel shard, of which it keeps its rows."""
        parameter = self._parameters[name]
        start, stop = row_range(self._infos[name].local_shape, self._groups.mesh, self._groups.dp)
        with torch.no_grad():
            rows = local[start:stop] if local.dim() else local
            parameter.to_local().copy_(rows)
            if name in self._masters:
                self._masters[name].copy_(rows)

    def pieces_of(self, dp: int) -> tuple[Piece, ...]:
        """What data-parallel rank ``dp`` keeps of the trained parameters of these stages."""
        return tuple(_piece(leaf.pieces[0].parameter, self._groups, dp) for leaf in self.leaves)

    def held(self) -> dict[str, list[Tensor]]:
        """What is kept between steps, by category of memory; gradients come with the first backward."""
        rows = [parameter.to_local() for parameter in self._parameters.values()]
        if not self._masters:
            return {"master": rows}
        return {"parameters": rows, "master": list(self._masters.values())}

    def _model_reductions(self) -> list[tuple[dist.ProcessGroup, list[Leaf]]]:
        found: list[tuple[dist.ProcessGroup, list[Leaf]]] = []
        tp_group = self._groups.tp_group
        partial = [leaf for leaf in self.leaves if leaf.pieces[0].parameter.is_tp_partial] if tp_group else []
        if tp_group is not None and partial:
            found.append((tp_group, partial))
        for ties, group in sorted(self._groups.tie_groups.items()):
            found.append((group, [leaf for leaf in self.leaves if leaf.pieces[0].parameter.ties == ties]))
        return found

    def _leaf(self, info: ParameterInfo, parameter: DTensor) -> Leaf:
        groups = self._groups
        is_tp_sharded = isinstance(info.placement, Shard)
        master = self._masters.get(info.name)
        return Leaf(
            master=parameter.to_local().detach() if master is None else master,
            gradient=lambda: _local_gradient(parameter),
            pieces=(_piece(info, groups, groups.dp),),
            is_decayed=info.is_decayed,
            is_counted=(is_tp_sharded or groups.tp == 0) and (not info.ties or groups.pp == info.ties[0]),
            is_apart=self._storage.has_apart_gradients,
            is_sent=self._storage.is_offloaded,
        )


def _local_gradient(parameter: DTensor) -> Tensor | None:
    gradient = parameter.grad
    return None if gradient is None else cast("DTensor", gradient).to_local()


def _piece(info: ParameterInfo, groups: RankGroups, dp: int) -> Piece:
    """The rows of the local tensor that a data-parallel rank keeps."""
    start, stop = row_range(info.local_shape, groups.mesh, dp)
    row = math.prod(info.local_shape[1:])
    return Piece(parameter=info, flat_start=start * row, flat_stop=stop * row, offset=0)


def _shard_stage(
    stage: Stage, mesh: DeviceMesh, policy: MixedPrecisionPolicy, *, keeps_blocks: bool
) -> list[FSDPModule]:
    """Shards a stage block by block; returns the modules whose parameters stay whole from ``unshard`` to ``reshard``."""
    kept: list[FSDPModule] = []
    for block in stage.blocks:
        if any(True for _ in block.parameters()):
            fully_shard(block, mesh=mesh, reshard_after_forward=not keeps_blocks, mp_policy=policy)
            if keeps_blocks:
                kept.append(cast("FSDPModule", block))
    if not keeps_blocks:
        _prefetch_backwards(stage)
    has_shared = any(True for _ in stage.parameters(recurse=False))
    fully_shard(stage, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
    if has_shared:
        kept.insert(0, cast("FSDPModule", stage))
    for module in kept:
        module.set_reshard_after_backward(False, recurse=False)
    for part in stage.modules():
        if isinstance(part, FSDPModule):
            # Gradients are summed: the loss is already divided by all targets. Without the second line FSDP2 would ask for a
            # sum that multiplies by 1 first, which gloo does not have.
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
    return kept


def _prefetch_backwards(stage: Stage) -> None:
    """Each block asks for the one before it, the first for itself: it then asks for nothing.

    Left alone FSDP2 goes by the order of all forwards since the last backward: with several microbatches in flight it would gather the last
    block once more behind the first, and in the cool-down, where no forward has been, nothing ahead.
    """
    blocks = [cast("FSDPModule", block) for block in stage.blocks if isinstance(block, FSDPModule)]
    for block, before in zip(blocks, (*blocks[:1], *blocks), strict=False):
        block.set_modules_to_backward_prefetch([before])


def _materialise(module: nn.Module, device: torch.device) -> None:
    module.to_empty(device=device, recurse=False)
