"""Any operator of torch, with random numbers that all ranks of a stage agree on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shardstage.operators.context import OperatorContext
from shardstage.operators.resolve import resolve

__all__ = ["seeded"]


def seeded(context: OperatorContext, target: str, ordinal: int, *args: Any, **kwargs: Any) -> Any:
    """``target(*args, **kwargs)``, drawing from generators seeded by seed, step, op and samples; torch's own go on as if nothing were.

    The numbers depend on which samples share a microbatch, so they agree between tensor-parallel ranks, not between meshes.
    """
    devices = {a.device for a in args if isinstance(a, Tensor) and a.device.type != "cpu"}
    with torch.random.fork_rng(
        devices=list(devices), device_type=next(iter(devices)).type if devices else "cuda"
    ):
        torch.manual_seed(context.random.seed_of(ordinal, *context.random.positions))
        return resolve(target)(*args, **kwargs)
