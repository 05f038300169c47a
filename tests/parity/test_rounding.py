"""Disturbed arithmetic errs as the model of rounding says, and nowhere else."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from shardstage.parity.rounding import UNIT_ROUNDOFF, Rounding

FLOAT32 = {torch.float64: UNIT_ROUNDOFF["float32"]}


def disturbed(compute: object, *tensors: Tensor, seed: int = 0) -> Tensor:
    with Rounding(FLOAT32, seed=seed):
        result: Tensor = compute(*tensors)  # type: ignore[operator]
    return result


def test_a_result_errs_by_at_most_its_roundoff() -> None:
    x = torch.randn(1000, dtype=torch.float64)
    relative = (disturbed(torch.exp, x) / x.exp() - 1).abs()
    u = UNIT_ROUNDOFF["float32"]
    assert u / 2 < relative.max() <= 2.01 * u


def test_no_two_results_err_alike() -> None:
    x = torch.randn(100, dtype=torch.float64)
    assert not torch.equal(disturbed(torch.exp, x, seed=1), disturbed(torch.exp, x, seed=2))
    with Rounding(FLOAT32, seed=1):
        assert not torch.equal(x.exp(), x.exp())


@pytest.mark.parametrize(
    "compute",
    [lambda x: x.t(), lambda x: x.clone(), lambda x: x[:3], lambda x: torch.cat([x, x]), lambda x: x.relu()],
    ids=["view", "copy", "slice", "cat", "selection"],
)
def test_what_only_moves_elements_stays_exact(compute: object) -> None:
    x = torch.randn(8, 8, dtype=torch.float64)
    assert torch.equal(disturbed(compute, x), compute(x))  # type: ignore[operator]


def test_a_masked_score_stays_minus_infinity() -> None:
    scores = torch.full((4, 4), -torch.inf, dtype=torch.float64)
    assert torch.equal(disturbed(lambda s: s * 0.5, scores), scores)


@pytest.mark.parametrize("length", [64, 4096])
def test_float32_products_and_sums_stay_within_what_they_are_disturbed_by(length: int) -> None:
    """The model must not promise more than float32 keeps: real errors are at most about the disturbance."""
    generator = torch.Generator().manual_seed(length)
    a = torch.randn(16, length, generator=generator, dtype=torch.float64).float().double()
    b = torch.randn(length, 16, generator=generator, dtype=torch.float64).float().double()
    for compute in (torch.mm, lambda a, b: (a * b.t()).sum(1), lambda a, b: a.abs().sum(1)):
        real = (compute(a.float(), b.float()).double() - compute(a, b)).norm()
        model = (disturbed(compute, a, b) - compute(a, b)).norm()
        assert 0.01 * model < real < 2 * model


def test_a_sum_that_cancels_errs_by_the_size_of_its_terms() -> None:
    terms = torch.randn(1000, dtype=torch.float64)
    balanced = torch.cat([terms, -terms]).repeat(50, 1)
    error = disturbed(lambda x: x.sum(1), balanced).norm() / math.sqrt(50)
    assert error > 0.1 * UNIT_ROUNDOFF["float32"] * balanced[0].norm()


def test_backward_is_disturbed_too_and_counted() -> None:
    x = torch.randn(8, 8, dtype=torch.float64, requires_grad=True)
    with Rounding(FLOAT32, seed=0) as rounding:
        forward_ops = rounding.num_ops
        loss = (x @ x).sin().sum()
        seen = rounding.num_ops
        (gradient,) = torch.autograd.grad(loss, x)
    (exact,) = torch.autograd.grad((x @ x).sin().sum(), x)
    assert forward_ops == 0 and 3 <= seen < rounding.num_ops
    assert rounding.longest_sum == 64
    assert 0 < (gradient - exact).norm() < 1e-5 * exact.norm()


def test_gradients_of_an_embedding_err_by_what_each_row_adds_up() -> None:
    table = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([0] * 500 + [1])
    flow = torch.randn(501, 4, dtype=torch.float64)
    flow[:500] -= flow[:500].mean(0)
    with Rounding(FLOAT32, seed=0):
        (gradient,) = torch.autograd.grad(torch.nn.functional.embedding(ids, table), table, flow)
    assert gradient[0].abs().max() > 1e-8
    assert gradient[2].abs().max() == 0


def test_other_dtypes_are_left_alone() -> None:
    x = torch.arange(5)
    assert torch.equal(disturbed(lambda x: x * 2, x), x * 2)
    y = torch.randn(5)
    assert torch.equal(disturbed(torch.exp, y), y.exp())
