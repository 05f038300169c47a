"""``signatures``: one number for each sample of an activation, by which two runs can be compared without keeping the activation."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from shardstage.layout import Placement, Replicate, Shard

__all__ = ["signatures"]


def signatures(
    name: str, tensor: Tensor, placement: Placement | None = None, tp_rank: int = 0
) -> tuple[float, ...]:
    """Each sample's sum of elements times random signs, which depend on ``name`` and place alone.  tensor: [b, ...] → b numbers

    Two activations that differ by d have signatures that differ by about the L2 norm of d. The signatures of shards add up to the whole
    tensor's.
    """
    placement = placement or Replicate()
    shape = list(tensor.shape[1:])
    if isinstance(placement, Shard):
        shape[placement.dim - 1] = placement.length
    signs = _signs(name, tuple(shape))
    if isinstance(placement, Shard):
        parts = [signs.narrow(placement.dim - 1, a, b - a) for a, b in placement.intervals(tp_rank)]
        signs = torch.cat(parts, dim=placement.dim - 1)
    flat = tensor.detach().to("cpu", torch.float64).flatten(1)
    sums: list[float] = (flat @ signs.flatten()).tolist()
    return tuple(sums)


def _signs(name: str, shape: tuple[int, ...]) -> Tensor:
    digest = hashlib.blake2b(name.encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    bits = torch.randint(0, 2, shape, generator=generator, dtype=torch.int8)
    return bits.double().mul_(2).sub_(1)
