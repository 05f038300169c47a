"""Parameters sharded over dp by FSDP2 (ZeRO-2 and ZeRO-3), block by block."""

from __future__ import annotations

import warnings
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from shardstage.layout import Replicate, Shard
from shardstage.runtime.groups import RankGroups
from shardstage.runtime.leaves import Leaf, ParameterInfo, Piece
from shardstage.runtime.stage import Stage

__all__ = ["FullyShardedParameters"]


class FullyShardedParameters:
    """Owns the parameters of one stage as row shards over dp; the same verbs as ``BucketedParameters``.

    FSDP2 unshards a block before it runs and reduce-scatters its gradients after each backward; ZeRO-3 also reshards after forward.
    The optimizer steps the local rows as plain tensors: DTensor's dispatch would cost more than the update of a small one.
    """

    def __init__(
        self,
        stage: Stage,
        groups: RankGroups,
        *,
        zero: int,
        compute_dtype: torch.dtype,
        master_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        assert groups.dp_group is not None
        self._groups = groups
        mesh = DeviceMesh.from_group(groups.dp_group, device.type, mesh_dim_names=("dp",))
        policy = (
            MixedPrecisionPolicy(
                param_dtype=compute_dtype, reduce_dtype=master_dtype, cast_forward_inputs=False
            )
            if compute_dtype != master_dtype
            else MixedPrecisionPolicy()
        )
        # FSDP2 warns of outputs that are views, lest somebody change them in place: blocks do not.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        keeps_whole = zero < 3
        for block in stage.blocks:
            if any(True for _ in block.parameters()):
                fully_shard(block, mesh=mesh, reshard_after_forward=not keeps_whole, mp_policy=policy)
        fully_shard(stage, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
        for module in stage.modules():
            if isinstance(module, FSDPModule):
                # Gradients are summed: the loss is already divided by all targets. Without the second line FSDP2 would ask for a
                # sum that multiplies by 1 first, which gloo does not have.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        for module in (stage, *stage.blocks):
            _materialise(module, device)
        self._parameters = {
            name: cast("DTensor", held[1]) for name, held in stage.parameters_by_name().items()
        }
        self._infos = stage.infos
        self.leaves: tuple[Leaf, ...] = tuple(
            self._leaf(self._infos[name], parameter)
            for name, parameter in self._parameters.items()
            if parameter.requires_grad
        )

    def begin(self) -> None:
        """Forgets the gradients of the step before."""
        for parameter in self._parameters.values():
            parameter.grad = None

    def expect_last_backward(self) -> None:
        """Nothing: FSDP2 reduces after every backward."""

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
        """Nothing: blocks gather the new rows at their next unshard."""

    def assign(self, name: str, local: Tensor) -> None:
        """Gives a parameter its value: ``local`` is this rank's tensor-parallel shard, of which it keeps its rows."""
        parameter = self._parameters[name]
        start, stop = _rows(self._infos[name], self._groups)
        with torch.no_grad():
            parameter.to_local().copy_(local[start:stop] if local.dim() else local)

    def _model_reductions(self) -> list[tuple[dist.ProcessGroup, list[Leaf]]]:
        found: list[tuple[dist.ProcessGroup, list[Leaf]]] = []
        tp_group = self._groups.tp_group
        partial = (
            [leaf for leaf in self.leaves if _is_tp_partial(leaf.pieces[0].parameter)] if tp_group else []
        )
        if tp_group is not None and partial:
            found.append((tp_group, partial))
        for stages, group in self._groups.tie_groups.items():
            found.append((group, [leaf for leaf in self.leaves if leaf.pieces[0].parameter.stages == stages]))
        return found

    def _leaf(self, info: ParameterInfo, parameter: DTensor) -> Leaf:
        groups = self._groups
        start, stop = _rows(info, groups)
        row = int(torch.Size(info.local_shape[1:]).numel())
        is_tp_sharded = isinstance(info.placement, Shard)
        return Leaf(
            master=parameter.to_local().detach(),
            gradient=lambda: _local_gradient(parameter),
            pieces=(Piece(parameter=info, flat_start=start * row, flat_stop=stop * row, offset=0),),
            is_decayed=info.is_decayed,
            is_counted=(is_tp_sharded or groups.tp == 0)
            and (len(info.stages) < 2 or groups.pp == info.stages[0]),
        )


def _local_gradient(parameter: DTensor) -> Tensor | None:
    gradient = parameter.grad
    return None if gradient is None else cast("DTensor", gradient).to_local()


def _is_tp_partial(info: ParameterInfo) -> bool:
    return isinstance(info.placement, Replicate) and info.placement.has_partial_grad


def _rows(info: ParameterInfo, groups: RankGroups) -> tuple[int, int]:
    """The rows of the local tensor that this dp rank keeps: ``torch.chunk`` along dim 0, as FSDP2 cuts."""
    num_rows = info.local_shape[0] if info.local_shape else 1
    size = -(-num_rows // groups.mesh.dp) if num_rows else 0
    return min(groups.dp * size, num_rows), min((groups.dp + 1) * size, num_rows)


def _materialise(module: nn.Module, device: torch.device) -> None:
    module.to_empty(device=device, recurse=False)
