"""Tolerances follow from the probes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from shardstage.parity.probe import Probe
from shardstage.parity.tolerance import CONFIDENCE, Derivation, Tolerances, derive_tolerances, num_probes
from shardstage.parity.trajectory import Trajectory


def trajectory(scale: float = 1.0, **tensors: Sequence[float]) -> Trajectory:
    values = {n: scale * torch.tensor(v, dtype=torch.float64) for n, v in tensors.items()}
    return Trajectory(
        losses=(2.0 * scale, 1.0 * scale), gradient_norms=(4.0, 4.0), gradients=values, parameters=values
    )


def derived(reference: Trajectory, *probes: Trajectory) -> Tolerances:
    zeros: dict[str, Tensor] = {n: torch.zeros_like(t) for n, t in reference.parameters.items()}
    made = [
        Probe(trajectory=t, activations={"x": {0: 1.0 + 1e-3 * i}}, num_ops=7, longest_sum=9 + i)
        for i, t in enumerate(probes)
    ]
    return derive_tolerances(reference, {"x": {0: 1.0}}, zeros, made, precision="bfloat16")


def test_a_loss_may_err_by_the_probes_root_mean_square() -> None:
    found = derived(trajectory(a=[1.0]), trajectory(1.01, a=[1.0]), trajectory(0.99, a=[1.0]))
    assert found.loss == pytest.approx(CONFIDENCE * ((0.02**2 + 0.01**2) / 2) ** 0.5)
    assert found.gradient_norm == found.gradients["a"]
    assert found.activations["x"] == pytest.approx(CONFIDENCE * 1e-3 / 2**0.5)


def test_a_tensor_is_taken_to_be_no_steadier_than_the_median() -> None:
    """A scalar that two probes happened to leave alone would otherwise have no tolerance at all."""
    reference = trajectory(a=[1.0, 0.0], b=[10.0, 0.0], lucky=[5.0])
    probe = trajectory(a=[1.02, 0.0], b=[10.1, 0.0], lucky=[5.0])
    found = derived(reference, probe, probe)
    assert found.gradients["a"] == pytest.approx(CONFIDENCE * 0.02)
    assert found.gradients["b"] == pytest.approx(CONFIDENCE * 0.1)
    assert found.gradients["lucky"] == pytest.approx(CONFIDENCE * 0.05)


def test_a_gradient_that_is_zero_but_for_rounding_has_the_probes_tolerance() -> None:
    """As that of a key's bias, which moves all scores of a query alike."""
    found = derived(trajectory(a=[1.0], key_bias=[0.0]), trajectory(a=[1.0], key_bias=[1e-9]))
    assert found.gradients["key_bias"] == pytest.approx(CONFIDENCE * 1e-9)


@pytest.mark.parametrize(("steps", "probes"), [(1, 8), (2, 4), (3, 3), (4, 2), (20, 2)])
def test_every_pooled_figure_rests_on_eight_samples(steps: int, probes: int) -> None:
    assert num_probes(steps) == probes


def test_the_derivation_says_its_numbers_in_80_columns() -> None:
    derivation: Derivation = derived(trajectory(a=[1.0]), trajectory(1.01, a=[1.0])).derivation
    text = derivation.text()
    assert [line for line in text.splitlines() if len(line) > 80] == []
    for said in (
        "u = 0.0039: the roundoff of bfloat16",
        "n = 9 terms",
        "7 results",
        "λ = 8",
        "Higham & Mary",
    ):
        assert said in text
