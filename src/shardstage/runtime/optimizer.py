"""The optimizer's settings, its learning-rate schedule and its step over leaves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch

from shardstage.compat import scale_all
from shardstage.runtime.leaves import Leaf

__all__ = ["RUN_BYTES", "Optimizer", "OptimizerConfig", "learning_rate"]

RUN_BYTES: Final = 64 * 2**20
"""Of masters that are stepped at once where their gradients lie apart: launches cost little then, and the room is small beside a model."""


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
    """Steps the leaves of one rank with torch's own optimizer: what is elementwise is the same on a shard as on the whole.

    Where gradients lie apart from masters, leaves are stepped in runs of at most ``RUN_BYTES`` (or of one larger leaf), each run's
    gradients brought to its masters first: widened in a tensor that comes and goes, or sent to the host into one that stays.
    """

    def __init__(
        self, config: OptimizerConfig, leaves: Sequence[Leaf], *, run_bytes: int = RUN_BYTES
    ) -> None:
        self.config = config
        self.leaves = tuple(leaves)
        self._runs = [
            _Run(found, _torch_optimizer(config, found)) for found in _in_runs(self.leaves, run_bytes)
        ]
        self._run_of = {id(leaf): run for run in self._runs for leaf in run.leaves}
        self._landing = _landing([run for run in self._runs if run.is_sent])

    def step(self, step: int, *, gradient_scale: float = 1.0) -> float:
        """Updates every leaf's master from its gradient times ``gradient_scale``; returns the learning rate used."""
        rate = learning_rate(self.config, step)
        for run in self._runs:
            if run.torch_optimizer is not None:
                self._step(run, run.torch_optimizer, rate, gradient_scale)
        return rate

    def _step(
        self, run: _Run, torch_optimizer: torch.optim.Optimizer, rate: float, gradient_scale: float
    ) -> None:
        for group in torch_optimizer.param_groups:
            group["lr"] = rate
        gradients = run.gradients(self._landing)
        present = [gradient for gradient in gradients if gradient is not None]
        if gradient_scale != 1.0 and present:
            scale_all(present, gradient_scale)
        for leaf, gradient in zip(run.leaves, gradients, strict=True):
            leaf.master.grad = gradient
        torch_optimizer.step()
        for leaf in run.leaves:
            if not leaf.owns_gradient:
                leaf.master.grad = None

    def state(self, leaf: Leaf) -> dict[str, torch.Tensor]:
        """The leaf's optimizer state by name, tensors of the leaf's shape; made (as zeros) where no step has run yet."""
        names = ("exp_avg", "exp_avg_sq") if self.config.kind == "adamw" else ("momentum_buffer",)
        torch_optimizer = self._run_of[id(leaf)].torch_optimizer
        if torch_optimizer is None or not leaf.master.numel():
            return {name: torch.zeros_like(leaf.master, requires_grad=False) for name in names}
        state = torch_optimizer.state[leaf.master]
        for name in names:
            if state.get(name) is None:
                state[name] = torch.zeros_like(leaf.master, requires_grad=False)
        if self.config.kind == "adamw":
            state.setdefault("step", torch.tensor(0.0))
        return {name: state[name] for name in names}

    def set_num_steps(self, num_steps: int) -> None:
        """Says how many steps the loaded state has seen (AdamW corrects its bias by it)."""
        if self.config.kind != "adamw":
            return
        for run in self._runs:
            for state in () if run.torch_optimizer is None else run.torch_optimizer.state.values():
                state["step"] = torch.tensor(float(num_steps))

    def on_host(self) -> list[torch.Tensor]:
        """What of an offloaded optimizer lies in the host's memory: masters, their state, and where gradients land."""
        sent = [leaf for run in self._runs if run.is_sent for leaf in run.leaves]
        states = [tensor for leaf in sent for tensor in self.state(leaf).values()]
        landing = [] if self._landing is None else [self._landing]
        return [*(leaf.master for leaf in sent), *states, *landing]


@dataclass(frozen=True, eq=False)
class _Run:
    """Leaves that are stepped at once; without a torch optimizer where this rank holds nothing of them."""

    leaves: tuple[Leaf, ...]
    torch_optimizer: torch.optim.Optimizer | None

    @property
    def is_sent(self) -> bool:
        """Whether gradients travel to where masters lie."""
        return any(leaf.is_sent for leaf in self.leaves)

    @property
    def numel(self) -> int:
        return sum(leaf.master.numel() for leaf in self.leaves)

    def gradients(self, landing: torch.Tensor | None) -> list[torch.Tensor | None]:
        """As masters take them: of their dtype, on their device; ``landing`` is where those go that travel."""
        found: list[torch.Tensor | None] = []
        used = 0
        for leaf in self.leaves:
            gradient = leaf.gradient()
            if gradient is None or not leaf.is_apart:
                found.append(gradient)
            elif landing is None:
                found.append(gradient.to(leaf.master.dtype, copy=True))
            else:
                place = landing[used : used + gradient.numel()].view(gradient.shape)
                found.append(place.copy_(gradient))
                used += gradient.numel()
        return found


def _in_runs(leaves: Sequence[Leaf], run_bytes: int) -> Iterator[tuple[Leaf, ...]]:
    """All leaves at once where gradients lie with their masters."""
    if not any(leaf.is_apart for leaf in leaves):
        yield tuple(leaves)
        return
    run: list[Leaf] = []
    for leaf in leaves:
        if run and sum(each.master.nbytes for each in run) + leaf.master.nbytes > run_bytes:
            yield tuple(run)
            run = []
        run.append(leaf)
    yield tuple(run)


def _landing(runs: Sequence[_Run]) -> torch.Tensor | None:
    """Room on the masters' side for the gradients of the largest run."""
    if not runs:
        return None
    first = runs[0].leaves[0].master
    return torch.empty(max(run.numel for run in runs), dtype=first.dtype, pin_memory=first.is_pinned())


def _torch_optimizer(config: OptimizerConfig, leaves: Sequence[Leaf]) -> torch.optim.Optimizer | None:
    """``None`` where this rank holds nothing to update."""
    groups = [
        {
            "params": [
                leaf.master for leaf in leaves if leaf.is_decayed == is_decayed and leaf.master.numel()
            ],
            "weight_decay": decay,
        }
        for is_decayed, decay in ((True, config.weight_decay), (False, 0.0))
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        return None
    if config.kind == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)
