"""What attention reads, by name, and whether it keeps its scores."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from tests.cost.machines import round_machine
from tests.graph.small_graphs import call, graph, value
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from shardstage.graph import Ref
from shardstage.graph.attention import (
    ATTENTION,
    DROPPING_ATTENTION,
    AttentionOperands,
    attention_operands,
    draws_attention,
    is_attention,
    is_causal,
    kept_scores,
)
from shardstage.graph.capture import capture
from shardstage.graph.saved import saved_values
from shardstage.graph.saved_on import saved_on
from shardstage.graph.source import ModelSource
from shardstage.graph.tasks import causal_task
from shardstage.plan import complete, parse_request
from shardstage.planner import predict

VOCAB, WIDTH = 20, 8


class _Same(nn.Module):
    """Attention over one tensor: it is query, key and value."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.dropout = dropout
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids).unflatten(-1, (2, -1)).transpose(1, 2)
        mixed = scaled_dot_product_attention(x, x, x, dropout_p=self.dropout, is_causal=True)
        logits: Tensor = self.head(mixed.transpose(1, 2).flatten(-2))
        return logits


def same_source(dropout: float) -> ModelSource:
    return ModelSource(
        name="same", factory=partial(_Same, dropout), task=causal_task(VOCAB), vocab_size=VOCAB
    )


@pytest.mark.parametrize("target", [ATTENTION, DROPPING_ATTENTION])
def test_operands_are_known_by_place_and_by_name(target: str) -> None:
    by_place = call("y", target, "q", "k", "v", "m", 0.1)
    named = (("value", Ref("v")), ("key", Ref("k")), ("attn_mask", Ref("m")))
    by_name = replace(by_place, args=(Ref("q"),), kwargs=named)
    assert (
        attention_operands(by_place) == attention_operands(by_name) == AttentionOperands("q", "k", "v", "m")
    )


def test_a_value_may_be_all_of_them() -> None:
    op = call("y", ATTENTION, "x", "x", "x", None, 0.0, True)
    assert op.inputs == ("x",)
    assert attention_operands(op) == AttentionOperands("x", "x", "x", None)


def test_keys_that_are_the_values_are_named_twice() -> None:
    op = call("y", ATTENTION, "q", "kv", "kv")
    assert attention_operands(op)[:3] == ("q", "kv", "kv")


def test_dropout_and_causality_are_known_by_place_and_by_name() -> None:
    plain = call("y", ATTENTION, "q", "k", "v")
    by_place = call("y", ATTENTION, "q", "k", "v", None, 0.1, True)
    by_name = replace(plain, kwargs=(("dropout_p", 0.1), ("is_causal", True)))
    for op, is_asked in ((plain, False), (by_place, True), (by_name, True)):
        assert draws_attention(op) is is_causal(op) is is_asked


def test_scores_are_found_by_their_shape() -> None:
    """[.., 3, 5] of queries [2, 4, 3, 8] and keys [2, 4, 5, 8], not a number a row."""
    values = [value(n, (2, 4, rows, 8), kind="input") for n, rows in (("q", 3), ("k", 5), ("v", 5))]
    kept = [value("y#rows", (2, 4, 3), kind="saved"), value("y#scores", (2, 4, 3, 5), kind="saved")]
    op = call("y", ATTENTION, "q", "k", "v", saved=("q", "k", "v", "y#rows", "y#scores"))
    found = graph([op], [*values, *kept, value("y", (2, 4, 3, 8))], output="y")
    assert kept_scores(found, op) == ["y#scores"]


def test_somebody_else_s_kernel_keeps_what_it_keeps() -> None:
    """Queries, keys and values in one tensor: nothing is read into its arguments. It could not be priced."""
    op = call("y", "mine.packed_attention.default", "qkv", 4, saved=("qkv", "y#rows"))
    values = [
        value("qkv", (2, 5, 24), kind="input", requires_grad=True),
        value("y", (2, 5, 8), requires_grad=True),
        value("y#rows", (2, 4, 5), kind="saved"),
    ]
    assert not is_attention(op)
    found = graph([op], values, output="y")
    assert "y#rows" in saved_values(found, 0, 1, "none")
    assert saved_on(found, "cuda") is found


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("kind", "dtype"), [("cpu", "float32"), ("cuda", "float32"), ("cuda", "bfloat16")])
def test_attention_over_one_tensor_has_a_price(dropout: float, kind: str, dtype: str) -> None:
    """Three operands were looked for among the names that an op reads, each once."""
    captured = capture(same_source(dropout), sequence=16, dtype="float32")
    plan = complete(
        parse_request(f"dp=1,mb=2,dtype={'bf16' if dtype == 'bfloat16' else 'fp32'}"),
        captured,
        num_ranks=1,
        global_batch=2,
        sequence=16,
        precision="bfloat16" if dtype == "bfloat16" else "float32",
    )
    found = predict(captured, plan, round_machine(1, kind=kind))
    assert found.step_time_s > 0 and found.ranks[0].total_bytes > 0


def test_what_it_keeps_of_one_tensor_is_what_torch_keeps() -> None:
    captured = capture(same_source(0.0), sequence=16, dtype="float32")
    (op,) = [op for op in captured.ops if is_attention(op)]
    assert len(set(attention_operands(op)[:3])) == 1
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x = torch.ones(captured.values[op.inputs[0]].shape, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        scaled_dot_product_attention(x, x, x, is_causal=True)
    by_storage = {tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in kept if tensor.ndim}
    assert sum(captured.values[name].num_bytes for name in op.saved) == sum(by_storage.values())
