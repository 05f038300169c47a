"""The unmodified model in float64: nothing in it computes narrower, and it drops what the ranks drop."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardstage.operators import OperatorContext, RandomState, library
from shardstage.parity.eager import Promotion, ReplayedDropout, in_float64

POSITIONS = (5, 2)


class Narrow(nn.Module):
    """Asks for float32 wherever a model can."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor([1 / 3]))
        self.weight = nn.Parameter(torch.tensor([1 / 3]))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        made = torch.arange(3, dtype=torch.float32), torch.zeros(2), x.new_ones(2, dtype=torch.float32)
        cast = x.float(), x.to(torch.float32), x.type_as(made[0])
        return (
            *made,
            *cast,
            F.softmax(x, dim=-1, dtype=torch.float32),
            self.weight * self.scale,
            x.bfloat16(),
        )


def random() -> RandomState:
    return RandomState(seed=3, step=1, positions=POSITIONS)


def test_every_narrower_float_becomes_float64() -> None:
    model = Narrow()
    with in_float64(model):
        found = model(torch.randn(3, dtype=torch.float64))
    assert {tensor.dtype for tensor in found} == {torch.float64}
    assert torch.get_default_dtype() == torch.float32


def test_rows_by_expert_are_multiplied_in_float64_too() -> None:
    rows = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 3, 2, dtype=torch.float64, requires_grad=True)
    with in_float64(nn.Identity()):
        found = F.grouped_mm(rows, weights, offs=torch.tensor([2, 2, 5], dtype=torch.int32))
    expected = torch.cat([rows[:2] @ weights[0], rows[2:5] @ weights[2], torch.zeros(1, 2)])
    torch.testing.assert_close(found, expected)
    found.sum().backward()  # type: ignore[no-untyped-call]
    assert weights.grad is not None and not weights.grad[1].any()


def test_a_cast_loses_no_bit() -> None:
    x = torch.rand(100, dtype=torch.float64)
    with Promotion():
        assert torch.equal(x.float(), x)


def test_random_numbers_are_those_of_float32() -> None:
    drawn = random().uniforms((4,), torch.device("cpu"), 0)
    with Promotion():
        assert torch.equal(random().uniforms((4,), torch.device("cpu"), 0), drawn)


def test_dropout_drops_what_the_operator_drops() -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    context = OperatorContext(tp_group=None, tp_rank=0, tp_size=1, random=random())
    operator = library(context)["shardstage.dropout"]
    expected = [operator(x, 0.3, ordinal, (2, 3, 4), 2, 0, ((0, 2),)) for ordinal in range(2)]
    with ReplayedDropout(random()) as mode:
        for _ in range(2):  # the ordinal starts anew with each forward
            mode.begin_forward(POSITIONS)
            found = [nn.Dropout(0.3)(x), F.dropout(x, 0.3)]
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-14, atol=0)
    assert not torch.equal(*expected)


def test_dropout_that_drops_nothing_takes_no_ordinal() -> None:
    x = torch.ones(2, 50, dtype=torch.float64)
    with ReplayedDropout(random()) as mode:
        mode.begin_forward(POSITIONS)
        first = F.dropout(x, 0.5)
        mode.begin_forward(POSITIONS)
        assert torch.equal(F.dropout(x, 0.0), x)
        assert torch.equal(F.dropout(x, 0.5, training=False), x)
        assert torch.equal(F.dropout(x, 0.5), first)


def test_attention_drops_what_the_operator_drops() -> None:
    query = torch.randn(2, 4, 5, 8, dtype=torch.float64)
    key, value = torch.randn(2, 2, 2, 5, 8, dtype=torch.float64).unbind(0)
    context = OperatorContext(tp_group=None, tp_rank=0, tp_size=1, random=random())
    operator = library(context)["shardstage.attention"]
    expected = operator(query, key, value, None, 0.4, True, None, True, 0, 4, ((0, 4),))
    with ReplayedDropout(random()) as mode:
        mode.begin_forward(POSITIONS)
        found = F.scaled_dot_product_attention(
            query, key, value, dropout_p=0.4, is_causal=True, enable_gqa=True
        )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_attention_masks_as_torch_does() -> None:
    """With a probability too small to drop anything, our own attention is torch's."""
    query, key, value = torch.randn(3, 2, 4, 5, 8, dtype=torch.float64).unbind(0)
    masks = [torch.rand(2, 1, 5, 5) > 0.3, torch.randn(5, 5, dtype=torch.float64), None]
    masks[0][..., 0] = True  # type: ignore[index]
    for mask in masks:
        with ReplayedDropout(random()) as mode:
            mode.begin_forward(POSITIONS)
            found = F.scaled_dot_product_attention(query, key, value, mask, 1e-12, scale=0.3)
        expected = F.scaled_dot_product_attention(query, key, value, mask, scale=0.3)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
