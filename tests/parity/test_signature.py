"""One number stands for an activation."""

from __future__ import annotations

import pytest
import torch

from shardstage.layout import Shard
from shardstage.parity.signature import signatures


def test_signatures_of_shards_add_up_to_the_wholes() -> None:
    tensor = torch.randn(2, 6, 4, dtype=torch.float64)
    fused = Shard(dim=1, sections=((2, 1, 0), (1, 1, 1)))
    parts = [
        tensor[:, [i for start, stop in fused.intervals(rank) for i in range(start, stop)]]
        for rank in range(3)
    ]
    found = [signatures("x", part, fused, rank) for rank, part in enumerate(parts)]
    assert [sum(values) for values in zip(*found, strict=True)] == pytest.approx(signatures("x", tensor))


def test_a_signature_moves_by_the_norm_of_what_changed() -> None:
    tensor, change = torch.randn(1, 50, 50), 1e-3 * torch.randn(200, 50, 50)
    moved = torch.tensor([signatures("x", tensor + c)[0] - signatures("x", tensor)[0] for c in change])
    assert 0.8 < moved.square().mean().sqrt() / change.flatten(1).norm(dim=1).mean() < 1.2


def test_each_sample_and_each_value_has_its_own() -> None:
    tensor = torch.randn(2, 8)
    first, second = signatures("x", tensor)
    assert signatures("x", tensor.flip(0)) == (second, first)
    assert signatures("y", tensor) != (first, second)
