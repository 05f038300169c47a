"""The optimizer's settings, its learning-rate schedule and its step over leaves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from shardstage.compat import scale_all
from shardstage.runtime.leaves import Leaf

__all__ = ["Optimizer", "OptimizerConfig", "learning_rate"]


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter, 2019) or SGD with momentum, warmed up and decayed along a cosine.

    ``weight_decay`` applies to parameters of two or more dims (matrices, embeddings), not to biases and norms. ``total_steps`` is where
    the cosine ends at ``min_lr_ratio * lr``; 0 keeps the rate constant after ``warmup_steps``. Gradients whose global L2 norm exceeds
    ``max_grad_norm`` are scaled down to it; ``None`` leaves them, and their norm unknown.
    """

    kind: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    momentum: float = 0.9
    warmup_steps: int = 0
    total_steps: int = 0
    min_lr_ratio: float = 0.1
    max_grad_norm: float | None = 1.0


def learning_rate(config: OptimizerConfig, step: int) -> float:
    """The rate of step ``step`` (the first is 0): linear from lr / warmup_steps up to lr, then a half cosine."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if not config.total_steps:
        return config.lr
    decay_steps = max(1, config.total_steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / decay_steps)
    ratio = config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * ratio


class Optimizer:
    """Steps the leaves of one rank with torch's own optimizer: what is elementwise is the same on a shard as on the whole."""

    def __init__(self, config: OptimizerConfig, leaves: Sequence[Leaf]) -> None:
        self.config = config
        self.leaves = tuple(leaves)
        groups = [
            {
                "params": [
                    leaf.master
                    for leaf in self.leaves
                    if leaf.is_decayed == is_decayed and leaf.master.numel()
                ],
                "weight_decay": decay,
            }
            for is_decayed, decay in ((True, config.weight_decay), (False, 0.0))
        ]
        self._torch_optimizer = _torch_optimizer(config, [group for group in groups if group["params"]])

    def step(self, step: int, *, gradient_scale: float = 1.0) -> float:
        """Updates every leaf's master from its gradient times ``gradient_scale``; returns the learning rate used."""
        rate = learning_rate(self.config, step)
        if self._torch_optimizer is None:
            return rate
        for group in self._torch_optimizer.param_groups:
            group["lr"] = rate
        gradients = [leaf.gradient() for leaf in self.leaves]
        if gradient_scale != 1.0:
            scale_all([g for g in gradients if g is not None], gradient_scale)
        for leaf, gradient in zip(self.leaves, gradients, strict=True):
            leaf.master.grad = gradient
        self._torch_optimizer.step()
        for leaf in self.leaves:
            if not leaf.owns_gradient:
                leaf.master.grad = None
        return rate

    def state(self, leaf: Leaf) -> dict[str, torch.Tensor]:
        """The leaf's optimizer state by name, tensors of the leaf's shape; made (as zeros) where no step has run yet."""
        names = ("exp_avg", "exp_avg_sq") if self.config.kind == "adamw" else ("momentum_buffer",)
        if self._torch_optimizer is None or not leaf.master.numel():
            return {name: torch.zeros_like(leaf.master, requires_grad=False) for name in names}
        state = self._torch_optimizer.state[leaf.master]
        for name in names:
            if state.get(name) is None:
                state[name] = torch.zeros_like(leaf.master, requires_grad=False)
        if self.config.kind == "adamw":
            state.setdefault("step", torch.tensor(0.0))
        return {name: state[name] for name in names}

    def set_num_steps(self, num_steps: int) -> None:
        """Says how many steps the loaded state has seen (AdamW corrects its bias by it)."""
        if self._torch_optimizer is None or self.config.kind != "adamw":
            return
        for state in self._torch_optimizer.state.values():
            state["step"] = torch.tensor(float(num_steps))


def _torch_optimizer(
    config: OptimizerConfig, groups: list[dict[str, object]]
) -> torch.optim.Optimizer | None:
    """``None`` where this rank holds nothing to update."""
    if not groups:
        return None
    if config.kind == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)
