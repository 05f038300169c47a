"""What runs for an op: how many kernels forward and backward, their shapes, and the bytes that each moves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.cost.handmade import Sketch
from tests.cost.toy import toy_graph

from shardstage.cost.kernels import Kernel, KernelReader
from shardstage.graph import Op, Ref, Value

B, S, H = 2, 8, 4
WHOLE = B * S * H * 2
"""Bytes of one float16 activation [B, S, H]."""


def kernels(sketch: Sketch, name: str) -> tuple[list[Kernel], list[Kernel]]:
    """Kernels of an op forward and backward."""
    graph = sketch.graph()
    fixed = {v.name for v in graph.values.values() if v.kind == "parameter"}
    found = KernelReader(graph, fixed.__contains__).kernels(next(op for op in graph.ops if op.name == name))
    return [k for k in found if not k.is_backward], [k for k in found if k.is_backward]


def moved(found: list[Kernel]) -> list[float]:
    return [kernel.moved_bytes(B) for kernel in found]


def shapes(found: list[Kernel], microbatch: int = B) -> list[tuple[int, int, int, int]]:
    return [kernel.sizes(microbatch) for kernel in found if kernel.kind == "product"]


def linear(*, has_bias: bool = False, requires_grad: bool = True) -> Sketch:
    sketch = Sketch(B)
    x = sketch.value("x", B, S, H, kind="input", requires_grad=requires_grad)
    operands = [x, sketch.parameter("w", 16, H)]
    if has_bias:
        operands.append(sketch.parameter("bias", 16))
    sketch.op("y", "linear", operands, B, S, 16, saved=("x", "w"))
    return sketch


def pointwise(family: str, *, saved: tuple[str, ...] = (), shape: tuple[int, ...] = (B, S, H)) -> Sketch:
    """An op of ``a`` [B, S, H] and ``b`` of ``shape``."""
    sketch = Sketch(B)
    a, b = sketch.value("a", B, S, H, kind="input"), sketch.value("b", *shape, kind="input")
    sketch.op("y", family, (a, b), B, S, H, saved=saved)
    return sketch


def test_a_linear_is_one_product_forward_and_two_backward() -> None:
    forward, backward = kernels(linear(), "y")
    assert shapes(forward) == [(B * S, 16, H, 1)]
    assert shapes(backward) == [(B * S, H, 16, 1), (H, 16, B * S, 1)]  # of the input, of the weight
    assert [kernel.is_weight for kernel in backward] == [False, True]


def test_a_product_reads_its_operands_and_writes_its_result() -> None:
    forward, backward = kernels(linear(), "y")
    x, w, y = WHOLE, 16 * H * 2, B * S * 16 * 2
    assert moved(forward) == [x + w + y]
    assert moved(backward) == [y + w + x, y + x + w]


def test_a_bias_s_gradient_is_a_sum() -> None:
    _, backward = kernels(linear(has_bias=True), "y")
    assert [kernel.kind for kernel in backward] == ["product", "product", "moved"]
    assert moved(backward)[2] == B * S * 16 * 2 + 16 * 2


def test_what_needs_no_gradient_is_not_computed() -> None:
    _, backward = kernels(linear(requires_grad=False), "y")
    assert [kernel.is_weight for kernel in backward] == [True]


def test_a_microbatch_makes_products_longer() -> None:
    forward, backward = kernels(linear(), "y")
    assert shapes(forward, 5) == [(5 * S, 16, H, 1)]
    assert shapes(backward, 5) == [(5 * S, H, 16, 1), (H, 16, 5 * S, 1)]
    assert forward[0].moved_bytes(5) == pytest.approx(16 * H * 2 + 5 / B * (WHOLE + B * S * 16 * 2))


def scores(*, is_causal: bool = False) -> Sketch:
    sketch = Sketch(B)
    q, k, v = (sketch.value(name, B, 3, S, H, kind="input") for name in "qkv")
    sketch.op("p", "matmul", (q, sketch.value("kt", B, 3, H, S, kind="input")), B, 3, S, S, saved=("q", "kt"))
    arguments = (q, k, v, None, 0.0, is_causal)
    sketch.op("y", "scaled_dot_product_attention", arguments, B, 3, S, H, saved=("q", "k", "v", "y"))
    return sketch


def test_a_product_of_each_head_is_counted_as_often() -> None:
    forward, backward = kernels(scores(), "p")
    assert shapes(forward) == [(S, S, H, B * 3)]
    assert shapes(backward) == [(S, H, S, B * 3), (H, S, S, B * 3)]
    assert shapes(forward, 7) == [(S, S, H, 7 * 3)]


def test_fused_attention_is_one_kernel_each_way() -> None:
    forward, backward = kernels(scores(), "y")
    assert [kernel.kind for kernel in forward + backward] == ["attention", "attention"]
    assert forward[0].flops == 2 * 2 * 3 * S * S * H
    assert backward[0].flops == 2.5 * forward[0].flops


def test_attention_that_looks_back_only_does_half() -> None:
    (whole,), _ = kernels(scores(), "y")
    (causal,), _ = kernels(scores(is_causal=True), "y")
    assert causal.flops == whole.flops / 2


@pytest.mark.parametrize("family", ["add", "sub"])
def test_a_sum_passes_its_gradient_on(family: str) -> None:
    forward, backward = kernels(pointwise(family), "y")
    assert (moved(forward), backward) == ([3 * WHOLE], [])


def test_what_a_sum_spread_out_is_summed_up_again() -> None:
    _, backward = kernels(pointwise("add", shape=(H,)), "y")
    assert moved(backward) == [WHOLE + H * 2]


def test_a_factor_s_gradient_reads_the_other_factor() -> None:
    forward, backward = kernels(pointwise("mul", saved=("a", "b")), "y")
    assert moved(forward) == [3 * WHOLE]
    assert moved(backward) == [3 * WHOLE, 3 * WHOLE]


def test_what_was_kept_is_read_beside_the_gradient_though_it_is_the_output() -> None:
    """A softmax keeps its output, whose gradient is another tensor."""
    sketch = Sketch(B)
    sketch.op("y", "softmax", (sketch.value("x", B, S, H, kind="input"), -1), B, S, H, saved=("y",))
    forward, backward = kernels(sketch, "y")
    assert (moved(forward), moved(backward)) == ([2 * WHOLE], [3 * WHOLE])


def test_a_dropout_writes_its_mask_and_reads_it_again() -> None:
    sketch = Sketch(B)
    sketch.value("mask", B, S, H, kind="saved", dtype="bool", requires_grad=False)
    x = sketch.value("x", B, S, H, kind="input")
    sketch.op("y", "dropout", (x, 0.1, True), B, S, H, saved=("mask",))
    forward, backward = kernels(sketch, "y")
    mask = WHOLE / 2
    assert (moved(forward), moved(backward)) == ([2 * WHOLE + mask], [2 * WHOLE + mask])


def test_a_layer_norm_s_backward_is_two_kernels() -> None:
    sketch = Sketch(B)
    x, w = sketch.value("x", B, S, H, kind="input"), sketch.parameter("w", H)
    sketch.op("y", "layer_norm", (x, [H], w), B, S, H, saved=("x", "w"))
    forward, backward = kernels(sketch, "y")
    assert moved(forward) == [2 * WHOLE + H * 2]
    assert moved(backward) == [3 * WHOLE + H * 2, 2 * WHOLE]


def viewed(family: str, *shape: int, **fields: Any) -> Sketch:
    sketch = Sketch(B)
    sketch.op("y", family, (sketch.value("x", B, S, H, kind="input"),), *shape, alias_of="x", **fields)
    return sketch


def test_a_view_runs_nothing() -> None:
    assert kernels(viewed("view", B * S, H), "y") == ([], [])


def test_a_slice_s_gradient_is_written_into_zeros_of_the_whole() -> None:
    forward, backward = kernels(viewed("slice", B, S // 2, H), "y")
    assert forward == []
    assert moved(backward) == [WHOLE + 2 * WHOLE / 2]
    assert kernels(viewed("slice", B, S, H), "y") == ([], [])  # all of it: a view


def test_an_embedding_reads_rows_and_fills_a_table_backward() -> None:
    sketch = Sketch(B)
    table = sketch.parameter("table", 100, H)
    ids = sketch.value("ids", B, S, kind="input", dtype="int64", requires_grad=False)
    sketch.op("y", "embedding", (table, ids), B, S, H, saved=("ids",))
    forward, backward = kernels(sketch, "y")
    assert moved(forward) == [B * S * 8 + 2 * WHOLE]
    assert moved(backward) == [100 * H * 2 + 2 * WHOLE]


def test_gradients_of_a_value_with_three_readers_are_added_twice() -> None:
    sketch = Sketch(B)
    y = sketch.op("y", "gelu", (sketch.value("x", B, S, H, kind="input"),), B, S, H, saved=("x",))
    for reader in ("r1", "r2", "r3"):
        sketch.op(reader, "gelu", (y,), B, S, H, saved=("y",))
    _, backward = kernels(sketch, "y")
    assert moved(backward) == [3 * WHOLE] * 3  # its own, and two sums
    assert moved(kernels(sketch, "r1")[1]) == [3 * WHOLE]


def test_a_frozen_branch_runs_nothing_backward() -> None:
    sketch = Sketch(B)
    x = sketch.value("x", B, S, H, kind="input", requires_grad=False)
    sketch.op("y", "gelu", (x,), B, S, H, requires_grad=False)
    assert kernels(sketch, "y")[1] == []


def test_an_op_without_tensors_that_scale_stays_as_the_microbatch_grows() -> None:
    sketch = Sketch(B)
    w = sketch.parameter("w", S, H)
    sketch.op("y", "linear", (w, sketch.parameter("v", H, H)), S, H)
    graph = sketch.graph()
    (forward, *_) = KernelReader(graph, lambda _: True).kernels(graph.ops[0])
    assert forward.sizes(7) == (S, H, H, 1)
    assert forward.moved_bytes(7) == forward.moved_bytes(1)


def test_a_product_with_its_bias_before_the_factors_grows_with_the_microbatch() -> None:
    """GPT-2's Conv1D is an addmm: its first tensor is the bias, which does not grow, and once no kernel did."""
    values = {
        "bias": Value(name="bias", shape=(6,), dtype="float32", kind="parameter", requires_grad=True),
        "x": Value(name="x", shape=(2 * 16, 8), dtype="float32", kind="activation", requires_grad=True),
        "w": Value(name="w", shape=(8, 6), dtype="float32", kind="parameter", requires_grad=True),
        "y": Value(name="y", shape=(2 * 16, 6), dtype="float32", kind="activation", requires_grad=True),
    }
    op = Op(name="y", target="aten.addmm.default", args=(Ref("bias"), Ref("x"), Ref("w")), outputs=("y",))
    graph = replace(toy_graph(num_layers=1), ops=(op,), values=values, microbatch=2)
    kernels = KernelReader(graph, lambda name: values[name].kind == "parameter").kernels(op)
    products = [kernel for kernel in kernels if kernel.kind == "product"]
    assert [kernel.sizes(3) for kernel in products] == [(48, 6, 8, 1), (48, 8, 6, 1), (8, 6, 48, 1)]
