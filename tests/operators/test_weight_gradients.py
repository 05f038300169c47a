"""Products with a weight: the same numbers as autograd's own, at once or in two halves, and added up in place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from shardstage.operators import OperatorContext, RandomState
from shardstage.operators.weight_gradients import addmm, linear, matmul

Product = Callable[[OperatorContext, Tensor, Tensor, Tensor], Tensor]


def call_addmm(context: OperatorContext, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return addmm(context, bias, x, weight)


CASES: dict[str, tuple[Product, Product, tuple[int, int], tuple[int, ...]]] = {
    # ours, torch's, shape of the weight, shape of x
    "linear": (linear, lambda _, x, w, b: torch.nn.functional.linear(x, w, b), (5, 7), (3, 2, 7)),
    "linear of rows": (linear, lambda _, x, w, b: torch.nn.functional.linear(x, w, b), (5, 7), (6, 7)),
    "addmm": (call_addmm, lambda _, x, w, b: torch.addmm(b, x, w), (7, 5), (6, 7)),
    "matmul": (lambda c, x, w, b: matmul(c, x, w) + b, lambda _, x, w, b: x @ w + b, (7, 5), (3, 2, 7)),
    "no rows": (linear, lambda _, x, w, b: torch.nn.functional.linear(x, w, b), (5, 7), (0, 7)),
    # of a rank that has none of the heads: the model's projections into them and out of them
    "linear from no heads": (
        linear,
        lambda _, x, w, b: torch.nn.functional.linear(x, w, b),
        (5, 0),
        (3, 2, 0),
    ),
    "linear into no heads": (
        linear,
        lambda _, x, w, b: torch.nn.functional.linear(x, w, b),
        (0, 7),
        (3, 2, 7),
    ),
    "addmm from no heads": (call_addmm, lambda _, x, w, b: torch.addmm(b, x, w), (0, 5), (6, 0)),
}


def context_of() -> OperatorContext:
    return OperatorContext(tp_group=None, tp_rank=0, tp_size=1, random=RandomState())


def accumulate(weight: Tensor, left: Tensor, right: Tensor) -> None:
    weight.grad = left @ right if weight.grad is None else weight.grad.addmm_(left, right)


def operands(name: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    _, _, weight, x = CASES[name]
    out = weight[0] if name.startswith(("linear", "no rows")) else weight[1]
    shapes = (x, weight, (out,))
    return tuple(torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes)  # type: ignore[return-value]


def gradients(product: Product, context: OperatorContext, name: str) -> list[Tensor]:
    x, weight, bias = operands(name)
    y = product(context, x, weight, bias)
    y.backward(torch.arange(y.numel(), dtype=y.dtype).view(y.shape))
    return [t.grad if t.grad is not None else torch.zeros_like(t) for t in (x, weight, bias)]


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_autograd(name: str) -> None:
    ours, theirs, _, _ = CASES[name]
    context = context_of()
    context.weights.accumulate = accumulate
    expected = gradients(theirs, context_of(), name)
    for found, wanted in zip(gradients(ours, context, name), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-14, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_without_an_owner_the_weight_is_left_to_autograd(name: str) -> None:
    ours, theirs, _, _ = CASES[name]
    for found, wanted in zip(
        gradients(ours, context_of(), name), gradients(theirs, context_of(), name), strict=True
    ):
        assert torch.equal(found, wanted)


def test_deferred_products_come_when_they_are_run() -> None:
    context = context_of()
    context.weights.accumulate = accumulate
    x, weight, bias = operands("linear")
    context.weights.deferred = products = []
    linear(context, x, weight, bias).sum().backward()
    context.weights.deferred = None
    assert x.grad is not None and bias.grad is not None
    assert weight.grad is None and len(products) == 1
    context.weights.run(products)
    expected = torch.autograd.grad(torch.nn.functional.linear(x, weight, bias).sum(), weight)[0]
    torch.testing.assert_close(weight.grad, expected, rtol=1e-14, atol=1e-12)
    assert products == []


def test_microbatches_add_up_in_place() -> None:
    context = context_of()
    context.weights.accumulate = accumulate
    x, weight, bias = operands("linear")
    linear(context, x, weight, bias).sum().backward()
    assert weight.grad is not None
    place, once = weight.grad.data_ptr(), weight.grad.clone()
    linear(context, x, weight, bias).sum().backward()
    assert weight.grad.data_ptr() == place
    torch.testing.assert_close(weight.grad, 2 * once, rtol=1e-14, atol=1e-12)


def test_a_frozen_weight_gets_no_gradient() -> None:
    context = context_of()
    context.weights.accumulate = accumulate
    x, weight, bias = operands("linear")
    weight.requires_grad_(requires_grad=False)
    linear(context, x, weight, bias).sum().backward()
    assert x.grad is not None and weight.grad is None


def test_no_gradient_of_an_input_that_needs_none_is_computed() -> None:
    context = context_of()
    context.weights.accumulate = accumulate
    x, weight, bias = operands("linear")
    linear(context, x.detach(), weight, bias).sum().backward()
    assert x.grad is None and weight.grad is not None
