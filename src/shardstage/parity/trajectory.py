"""``Trajectory``: what a few steps of training went through, and the loop that makes one in high precision on one process."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from shardstage.runtime.optimizer import OptimizerConfig, learning_rate

__all__ = ["StepGradients", "Trajectory", "follow"]


@dataclass(frozen=True, kw_only=True, eq=False)
class StepGradients:
    """A step before its update: the mean loss over all targets of the global batch, and its gradients by name."""

    loss: float
    gradients: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Trajectory:
    """Losses and gradient norms (before clipping) of every step, gradients of the first, parameters after the last, by name."""

    losses: tuple[float, ...]
    gradient_norms: tuple[float, ...]
    gradients: Mapping[str, Tensor]
    parameters: Mapping[str, Tensor]

    @property
    def num_steps(self) -> int:
        return len(self.losses)


def follow(
    parameters: Mapping[str, Tensor],
    gradients_of: Callable[[int], StepGradients],
    config: OptimizerConfig,
    *,
    num_steps: int,
    storage_dtype: torch.dtype = torch.float64,
) -> Trajectory:
    """Trains ``parameters`` (float64, changed in place) for ``num_steps`` by torch's own optimizer and the run's settings.

    A step clips by the global L2 norm, then updates; the parameters are rounded to ``storage_dtype`` after each. Frozen parameters,
    which have no gradient, stay.
    """
    optimizer = _optimizer(parameters, config)
    losses, norms, first = [], [], dict[str, Tensor]()
    for step in range(num_steps):
        found = gradients_of(step)
        norm = math.sqrt(sum(float(g.square().sum()) for g in found.gradients.values()))
        if step == 0:
            first = {name: gradient.clone() for name, gradient in found.gradients.items()}
        losses.append(found.loss)
        norms.append(norm)
        limit = config.max_grad_norm
        scale = 1.0 if limit is None or norm <= limit else limit / (norm + 1e-6)  # as torch's clip_grad_norm_
        for name, gradient in found.gradients.items():
            parameters[name].grad = gradient.to(parameters[name].dtype) * scale
        _update(optimizer, parameters.values(), learning_rate(config, step), storage_dtype)
    return Trajectory(
        losses=tuple(losses),
        gradient_norms=tuple(norms),
        gradients=first,
        parameters={name: parameter.detach() for name, parameter in parameters.items()},
    )


def _optimizer(parameters: Mapping[str, Tensor], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Weight decay holds for matrices, not for biases and norms."""
    groups: list[dict[str, object]] = [
        {"params": group, "weight_decay": decay}
        for group, decay in (
            ([p for p in parameters.values() if p.dim() >= 2], config.weight_decay),
            ([p for p in parameters.values() if p.dim() < 2], 0.0),
        )
        if group
    ]
    if config.kind == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)


def _update(
    optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], rate: float, storage_dtype: torch.dtype
) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    with torch.no_grad():
        for parameter in parameters:
            parameter.grad = None
            if storage_dtype != parameter.dtype:
                parameter.copy_(parameter.to(storage_dtype))
