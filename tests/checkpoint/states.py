"""States of made-up ranks, for the tests: what each holds of global tensors, under one plan or another."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from shardstage.checkpoint import StateEntry
from shardstage.layout import Placement, Replicate, Shard, balanced_sizes
from shardstage.layout.boxes import local_shape

WHOLE: Mapping[str, Tensor] = {
    "model.norm.weight": torch.linspace(-1, 1, 5),
    "model.qkv.weight": torch.randn(15, 4, generator=torch.Generator().manual_seed(0)),
    "optimizer.exp_avg.qkv.weight": torch.randn(15, 4, generator=torch.Generator().manual_seed(1)) * 1e-9,
    "optimizer.exp_avg_sq.qkv.weight": torch.rand(
        15, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    ),
    "model.up.weight": torch.randn(4, 10, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16),
    "buffer.count": torch.tensor(7),
}
"""The global tensors, by key."""

FUSED = Shard(dim=0, sections=(balanced_sizes(9, 3), (2, 1, 0), (1, 1, 1)))
"""Three heads of Q, three rows of K, three of V on three ranks, the last without K."""

TP_3: Mapping[str, Placement] = {
    **{key: FUSED for key in WHOLE if "qkv" in key},
    "model.up.weight": Shard(dim=1, sections=(balanced_sizes(10, 3),)),
}
"""Uneven tensor parallelism over three ranks; what is not listed is replicated."""


def part_of(whole: Tensor, placement: Placement, rank: int) -> Tensor:
    if not isinstance(placement, Shard):
        return whole.clone()
    parts = [whole.narrow(placement.dim, a, b - a) for a, b in placement.intervals(rank)]
    return torch.cat(parts, placement.dim)


def entries(
    tensors: Mapping[str, Tensor],
    placements: Mapping[str, Placement],
    tp_rank: int,
    *,
    dp: int = 0,
    num_dp: int = 1,
) -> list[StateEntry]:
    """What one rank holds; with ``num_dp`` ranks along dp each has its flat share of every local tensor, the last the smallest."""
    found = []
    for key, whole in tensors.items():
        placement = placements.get(key, Replicate())
        numel = math.prod(local_shape(tuple(whole.shape), placement, tp_rank))
        share = -(-numel // num_dp)
        start, stop = min(dp * share, numel), min((dp + 1) * share, numel)
        flat = part_of(whole, placement, tp_rank).reshape(-1)[start:stop].clone()
        found.append(
            StateEntry(
                key=key,
                tensor=flat,
                global_shape=tuple(whole.shape),
                placement=placement,
                tp_rank=tp_rank,
                flat_range=(start, stop),
            )
        )
    return found


def blank(found: list[StateEntry]) -> list[StateEntry]:
    """The same entries over memory that holds something else."""
    for entry in found:
        entry.tensor.fill_(1)
    return found


def assert_filled(found: list[StateEntry], tensors: Mapping[str, Tensor]) -> None:
    """Every element of every entry has the bits of the global tensor."""
    assert found
    for entry in found:
        expected = part_of(tensors[entry.key], entry.placement, entry.tp_rank).reshape(-1)
        start, stop = entry.flat_range or (0, expected.numel())
        assert torch.equal(entry.tensor.reshape(-1), expected[start:stop]), entry.key
