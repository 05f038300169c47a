"""Operators that need no peers, and the parts of those that do: held against torch's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shardstage.layout import balanced_sizes
from shardstage.operators import OperatorContext, RandomState, library
from shardstage.operators.moves import intervals_of, take

POSITIONS = (4, 1, 7)


def operators(**state: Any) -> Mapping[str, Any]:
    random = RandomState(**{"seed": 3, "step": 2, "positions": POSITIONS, **state})
    return library(OperatorContext(tp_group=None, tp_rank=0, tp_size=1, random=random))


def dropped(shape: tuple[int, ...], *, ordinal: int = 0, num_samples: int = 3, **state: Any) -> Tensor:
    """Dropout of ones, whole."""
    whole = ((0, shape[0]),)
    call = operators(**state)["shardstage.dropout"]
    result: Tensor = call(torch.ones(shape), 0.3, ordinal, shape, num_samples, 0, whole)
    return result


@given(st.integers(0, 2), st.integers(1, 4), st.data())
def test_parts_are_dropped_as_the_whole_is(dim: int, num_ranks: int, data: st.DataObject) -> None:
    shape = (6, 5, 4)
    num_sections = data.draw(st.sampled_from([1, 3] if dim == 0 else [1]))
    sections = (balanced_sizes(shape[dim] // num_sections, num_ranks),) * num_sections
    whole = dropped(shape)
    for rank in range(num_ranks):
        intervals = tuple(intervals_of(sections, rank))
        part = torch.ones(take(whole, dim, intervals).shape)
        found = operators()["shardstage.dropout"](part, 0.3, 0, shape, 3, dim, intervals)
        assert found.equal(take(whole, dim, intervals))


def test_each_sample_is_dropped_alike_in_any_microbatch() -> None:
    together = dropped((3, 8, 8))
    for index, position in enumerate(POSITIONS):
        alone = dropped((1, 8, 8), num_samples=1, positions=(position,))
        assert alone[0].equal(together[index])


def test_masks_differ_by_seed_step_op_and_sample() -> None:
    masks = [
        dropped((3, 8, 8)),
        dropped((3, 8, 8), ordinal=1),
        dropped((3, 8, 8), seed=4),
        dropped((3, 8, 8), step=3),
        dropped((3, 8, 8), positions=(0, 2, 3)),
    ]
    assert all(not a.equal(b) for i, a in enumerate(masks) for b in masks[:i])
    assert not masks[0][0].equal(masks[0][1])


def test_dropout_keeps_the_mean_and_passes_the_same_elements_back() -> None:
    x = torch.ones(3, 100, 100, requires_grad=True)
    y = operators()["shardstage.dropout"](x, 0.25, 0, (3, 100, 100), 3, 0, ((0, 3),))
    y.sum().backward()
    assert x.grad is not None and x.grad.equal(y.detach())
    assert y.unique().tolist() == pytest.approx([0, 1 / 0.75])
    # Three standard deviations of the mean of 30,000 elements, each of variance p / (1 - p).
    assert abs(y.mean().item() - 1) < 3 * (0.25 / 0.75 / 30_000) ** 0.5


def test_the_mask_is_the_same_in_every_dtype() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        x = torch.ones(3, 8, 8, dtype=dtype)
        y = operators()["shardstage.dropout"](x, 0.3, 0, (3, 8, 8), 3, 0, ((0, 3),))
        assert (y > 0).equal(dropped((3, 8, 8)) > 0)


@pytest.mark.parametrize("kind", ["causal", "grouped", "added mask", "boolean mask"])
def test_attention_that_drops_nothing_is_attention(kind: str) -> None:
    q, k, v = (torch.randn(3, heads, 5, 4, dtype=torch.float64) for heads in (4, 2, 2))
    if kind != "grouped":
        k, v = (torch.randn(3, 4, 5, 4, dtype=torch.float64) for _ in range(2))
    mask = {"added mask": torch.randn(1, 4, 5, 5).double(), "boolean mask": torch.randn(5, 5) > -1}.get(kind)
    causal, grouped = kind in ("causal", "grouped"), kind == "grouped"
    found = operators()["shardstage.attention"](q, k, v, mask, 0.0, causal, None, grouped, 0, 4, ((0, 4),))
    expected = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped)
    torch.testing.assert_close(found, expected)


def test_a_rank_drops_the_probabilities_of_its_heads_as_one_device_does() -> None:
    q, k, v = torch.randn(3, 3, 4, 5, 2).unbind()
    call = operators()["shardstage.attention"]
    whole = call(q, k, v, None, 0.5, False, None, False, 0, 4, ((0, 4),))
    for start, stop in ((0, 3), (3, 4), (4, 4)):
        own = (t[:, start:stop] for t in (q, k, v))
        part = call(*own, None, 0.5, False, None, False, 0, 4, ((start, stop),))
        torch.testing.assert_close(part, whole[:, start:stop])


def test_rows_that_others_hold_are_zeros_and_get_no_gradient() -> None:
    table = torch.randn(10, 4, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[0, 3, 9], [4, 5, 3]])
    expected = F.embedding(ids, table, padding_idx=3)
    parts = []
    for intervals in (((0, 4),), ((4, 10),), ((10, 10),)):
        weight = torch.cat([table[start:stop] for start, stop in intervals])
        parts.append(operators()["shardstage.embedding"](weight, ids, intervals, 3))
    torch.testing.assert_close(sum(parts), expected)
    weights = torch.randn_like(expected)
    (found,) = torch.autograd.grad((sum(parts) * weights).sum(), table)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), table)
    torch.testing.assert_close(found, wanted)


def test_a_table_in_several_pieces_is_looked_up_as_one() -> None:
    table = torch.randn(10, 4)
    intervals = ((0, 2), (5, 8))
    weight = torch.cat([table[a:b] for a, b in intervals])
    ids = torch.arange(10)
    found = operators()["shardstage.embedding"](weight, ids, intervals)
    is_held = torch.tensor([i in (0, 1, 5, 6, 7) for i in range(10)])
    assert found.equal(table * is_held.unsqueeze(1))


@pytest.mark.parametrize("num_classes", [7, 300_000])
def test_cross_entropy_over_all_classes_is_torchs(num_classes: int) -> None:
    logits = (10 * torch.randn(5, num_classes, dtype=torch.float64)).requires_grad_()
    labels = torch.tensor([0, num_classes - 1, -100, 3, 3])
    found = operators()["shardstage.cross_entropy"](logits, labels, ((0, num_classes),), -100)
    expected = F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad(loss * 0.5, logits)[0] for loss in (found, expected))
    torch.testing.assert_close(*gradients)


def test_foreign_random_ops_are_repeated_and_leave_torchs_numbers_alone() -> None:
    call = operators()["shardstage.seeded"]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = call("aten.bernoulli.p", 5, torch.ones(50), 0.5)
    assert torch.get_rng_state().equal(before)
    torch.rand(3)
    assert call("aten.bernoulli.p", 5, torch.ones(50), 0.5).equal(first)
    assert not call("aten.bernoulli.p", 6, torch.ones(50), 0.5).equal(first)


def test_heads_that_are_neighbours_are_a_view() -> None:
    x = torch.randn(2, 5, 3)
    call = operators()["shardstage.select_heads"]
    assert call(x, 1, (1, 2)).data_ptr() == x[:, 1].data_ptr()
    assert call(x, 1, (0, 0, 3)).equal(x[:, [0, 0, 3]])
    assert call(x, 1, ()).shape == (2, 0, 3)
