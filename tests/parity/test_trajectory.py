"""A few steps of training, as the run's settings have them."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from shardstage.parity.trajectory import StepGradients, follow
from shardstage.runtime.leaves import Leaf
from shardstage.runtime.optimizer import Optimizer, OptimizerConfig


def first() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.randn(3, 4, generator=generator, dtype=torch.float64),
        "bias": torch.randn(4, generator=generator, dtype=torch.float64),
    }


def gradients(step: int) -> StepGradients:
    generator = torch.Generator().manual_seed(step)
    found = {n: torch.randn(p.shape, generator=generator, dtype=torch.float64) for n, p in first().items()}
    return StepGradients(loss=float(step), gradients=found)


def by_runtime(config: OptimizerConfig, num_steps: int) -> Mapping[str, Tensor]:
    """What the ranks' own optimizer makes of the same gradients."""
    parameters = first()
    current: dict[str, Tensor] = {}
    leaves = [
        Leaf(
            master=p,
            gradient=lambda name=name: current[name],
            pieces=(),
            is_decayed=p.dim() >= 2,
            is_counted=True,
        )
        for name, p in parameters.items()
    ]
    optimizer = Optimizer(config, leaves)
    for step in range(num_steps):
        current.update({n: g.clone() for n, g in gradients(step).gradients.items()})
        norm = float(torch.stack([g.norm() for g in current.values()]).norm())
        limit = config.max_grad_norm
        scale = 1.0 if limit is None or norm <= limit else limit / (norm + 1e-6)
        optimizer.step(step, gradient_scale=scale)
    return parameters


@pytest.mark.parametrize(
    "config",
    [
        OptimizerConfig(warmup_steps=2, total_steps=6),
        OptimizerConfig(weight_decay=0.5, max_grad_norm=None),
        OptimizerConfig(kind="sgd", lr=0.1, momentum=0.5, max_grad_norm=0.1),
    ],
    ids=["adamw", "decayed", "sgd"],
)
def test_steps_are_those_of_the_runs_optimizer(config: OptimizerConfig) -> None:
    found = follow(first(), gradients, config, num_steps=4)
    for name, expected in by_runtime(config, 4).items():
        torch.testing.assert_close(found.parameters[name], expected, rtol=1e-12, atol=1e-12)


def test_norms_are_before_clipping_and_gradients_are_the_first_steps() -> None:
    found = follow(first(), gradients, OptimizerConfig(max_grad_norm=0.01), num_steps=3)
    expected = torch.stack([g.norm() for g in gradients(2).gradients.values()]).norm()
    assert found.gradient_norms[2] == pytest.approx(float(expected), rel=1e-12)
    assert torch.equal(found.gradients["bias"], gradients(0).gradients["bias"])
    assert found.losses == (0.0, 1.0, 2.0)


def test_parameters_can_be_kept_in_float32() -> None:
    parameters = {n: p.float().double() for n, p in first().items()}
    found = follow(parameters, gradients, OptimizerConfig(), num_steps=2, storage_dtype=torch.float32)
    for value in found.parameters.values():
        assert value.dtype == torch.float64 and torch.equal(value, value.float().double())


def test_a_parameter_without_gradient_stays() -> None:
    def frozen(step: int) -> StepGradients:
        return StepGradients(loss=0.0, gradients={"bias": gradients(step).gradients["bias"]})

    found = follow(first(), frozen, OptimizerConfig(), num_steps=2)
    assert torch.equal(found.parameters["matrix"], first()["matrix"])
    assert not torch.equal(found.parameters["bias"], first()["bias"])
