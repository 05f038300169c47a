"""``Storage``: in which dtypes, and on which side of the link to the host, a rank keeps its parameters, gradients and optimizer state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardstage.plan.plan import Plan
from shardstage.program.stage_parameters import gradient_dtype, master_dtype

__all__ = ["Storage"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Storage:
    """``gradient_dtype`` is that of gradients' sums. ``is_offloaded``: masters, and with them the optimizer's state, lie in the host's
    memory, page-locked where the device is a GPU; on a CPU they lie apart from the parameters all the same.
    """

    compute_dtype: torch.dtype
    gradient_dtype: torch.dtype
    master_dtype: torch.dtype
    device: torch.device
    is_offloaded: bool = False

    @staticmethod
    def of(plan: Plan, device: torch.device) -> Storage:
        """What a plan says."""
        return Storage(
            compute_dtype=getattr(torch, plan.precision),
            gradient_dtype=getattr(torch, gradient_dtype(plan)),
            master_dtype=getattr(torch, master_dtype(plan)),
            device=device,
            is_offloaded=plan.offload == "optimizer",
        )

    @property
    def has_apart_gradients(self) -> bool:
        """Whether gradients must be brought to the masters: they are narrower, or lie elsewhere."""
        return self.is_offloaded or self.gradient_dtype != self.master_dtype

    def needs_master(self, stored: torch.dtype) -> bool:
        """Whether a parameter that is stored so has a master weight apart from it."""
        return self.is_offloaded or stored != self.master_dtype

    def new_master(self, shape: Sequence[int]) -> Tensor:
        """Zeros where masters lie."""
        if not self.is_offloaded:
            return torch.zeros(tuple(shape), dtype=self.master_dtype, device=self.device)
        return torch.zeros(tuple(shape), dtype=self.master_dtype, pin_memory=self.device.type == "cuda")
