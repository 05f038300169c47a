"""``follow_reference``: the unmodified model trained on one process in float64, on the run's own samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shardstage.data import BatchSampler, Microbatch, RankBatches
from shardstage.errors import ConfigError
from shardstage.operators import RandomState
from shardstage.parity.eager import ReplayedDropout, in_float64
from shardstage.parity.trajectory import StepGradients, Trajectory, follow
from shardstage.runtime.weights import initialised_model
from shardstage.sharding.rules.random import draws_otherwise
from shardstage.training.job import TrainJob, source_of
from shardstage.training.samples import samples_of

__all__ = [
    "GlobalBatches",
    "first_values",
    "follow_reference",
    "master_dtype",
    "run_random",
    "stored_tensors",
]


class GlobalBatches:
    """The global batch of any step as the microbatches of all data-parallel ranks, first rank first."""

    def __init__(self, job: TrainJob) -> None:
        plan, data = job.plan, samples_of(job.config.data, source_of(job.config))
        sampler = BatchSampler(
            num_samples=data.num_samples, global_batch=plan.global_batch, seed=job.config.seed
        )
        starts = [sum(plan.shares[:dp]) for dp in range(plan.mesh.dp)]
        self._shares = [
            RankBatches(
                data,
                sampler,
                share=range(start, start + plan.shares[dp]),
                microbatches=[size for size in plan.microbatches(dp) if size],
            )
            for dp, start in enumerate(starts)
            if plan.shares[dp]
        ]

    def step(self, step: int) -> tuple[Microbatch, ...]:
        return tuple(batch for share in self._shares for batch in share.step(step))


def follow_reference(
    job: TrainJob, model: nn.Module, batches: GlobalBatches, *, num_steps: int
) -> Trajectory:
    """Trains ``model``, which the job's source made, as it is; tensors are known by the graph's parameter names (fqn).

    loss = (sum over the global batch of the losses of its target tokens) / (number of those tokens).
    """
    task = source_of(job.config).task
    random = run_random(job)
    named = dict(model.named_parameters(remove_duplicate=False))
    parameters = {p.fqn: named[p.fqn] for p in job.graph.parameters}
    _forbid_other_randomness(job)

    def gradients_of(step: int) -> StepGradients:
        microbatches = batches.step(step)
        num_targets = max(1, sum(batch.num_targets for batch in microbatches))
        model.zero_grad()
        loss = 0.0
        random.step = step
        with ReplayedDropout(random) as dropout:
            for batch in microbatches:
                dropout.begin_forward(batch.positions)
                part = task.loss(model, _widened(batch.tensors)) / num_targets
                part.backward()  # type: ignore[no-untyped-call]
                loss += float(part.detach())
        return StepGradients(loss=loss, gradients=dict(_gradients(parameters)))

    with in_float64(model):
        return follow(parameters, gradients_of, job.config.optimizer, num_steps=num_steps)


def first_values(job: TrainJob) -> nn.Module:
    """The whole model with the values that the ranks start from, in the dtype of their master weights."""
    model = initialised_model(
        source_of(job.config),
        seed=job.config.seed,
        dtype=master_dtype(job),
        folder=job.config.weights or None,
    )
    return model.train()


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the model's parameters and buffers, under all their names."""
    named = (model.named_parameters, model.named_buffers)
    return {name: t.detach().clone() for each in named for name, t in each(remove_duplicate=False)}


def run_random(job: TrainJob) -> RandomState:
    """The random numbers of the run's ranks, which depend on the kind of their device."""
    chosen = job.config.device
    is_cuda = chosen == "cuda" or (chosen == "auto" and torch.cuda.is_available())
    return _DrawnElsewhere(seed=job.config.seed, device=torch.device("cuda" if is_cuda else "cpu"))


def master_dtype(job: TrainJob) -> torch.dtype:
    """The dtype of the run's master weights."""
    return torch.float64 if job.plan.precision == "float64" else torch.float32


@dataclass(kw_only=True)
class _DrawnElsewhere(RandomState):
    """Draws on ``device`` what is used on another."""

    device: torch.device

    def uniforms(self, shape: tuple[int, ...], device: torch.device, *key: int) -> Tensor:
        return super().uniforms(shape, self.device, *key).to(device)


def _gradients(parameters: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for fqn, parameter in parameters.items():
        if parameter.requires_grad:
            yield fqn, torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _widened(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}


def _forbid_other_randomness(job: TrainJob) -> None:
    """Dropout can be replayed in the unmodified model; what else draws random numbers cannot."""
    drawing: Sequence[str] = [op.source or op.target for op in job.graph.ops if draws_otherwise(op)]
    if drawing:
        raise ConfigError(
            f"{job.config.model} draws random numbers that one process cannot repeat: {drawing[0]}",
            hint="turn this randomness off in the model's config to prove a run",
        )
