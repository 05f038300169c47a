"""Compiled chains: which ops become one kernel, and what it moves."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.cost.handmade import Sketch
from tests.cost.machines import round_machine
from tests.cost.toy import toy_graph

from shardstage.cost import fold, profile
from shardstage.cost.fusion import fused
from shardstage.cost.kernels import Kernel, KernelReader
from shardstage.graph import Ref

B, S, H = 2, 8, 4
WHOLE = B * S * H * 2
MASK = B * S * H


def both(sketch: Sketch) -> tuple[list[float], list[float]]:
    """Bytes of each kernel forward and backward."""
    found = kernels(sketch)
    forward, backward = ([k.moved_bytes(B) for k in found if k.is_backward is way] for way in (False, True))
    return forward, backward


def kernels(sketch: Sketch) -> tuple[Kernel, ...]:
    graph = sketch.graph()
    parameters = {name for name, value in graph.values.items() if value.kind == "parameter"}
    return fused(graph, KernelReader(graph, parameters.__contains__), graph.ops)


def added_and_gelu() -> Sketch:
    """bias → gelu, which keeps its input."""
    sketch = Sketch(B)
    x = sketch.op(
        "x", "linear", (sketch.value("h", B, S, H, kind="input"), sketch.parameter("w", H, H)), B, S, H
    )
    y = sketch.op("y", "add", (x, sketch.parameter("bias", H)), B, S, H)
    z = sketch.op("z", "gelu", (y,), B, S, H, saved=("y",))
    sketch.op("out", "linear", (z, sketch.parameter("v", H, H)), B, S, H)
    return sketch


def test_a_chain_reads_what_comes_in_and_writes_what_leaves_or_is_kept() -> None:
    forward, _ = both(added_and_gelu())
    assert forward[1] == WHOLE + H * 2 + WHOLE + WHOLE  # x, bias; z, and y for the backward
    assert len(forward) == 3


def test_backward_it_reads_gradients_and_what_was_kept_and_writes_one_gradient() -> None:
    found = [kernel for kernel in kernels(added_and_gelu()) if kernel.is_backward and kernel.kind == "moved"]
    assert [kernel.moved_bytes(B) for kernel in found] == [3 * WHOLE]


def test_a_dropout_before_a_sum_is_one_kernel() -> None:
    sketch = Sketch(B)
    sketch.value("mask", B, S, H, kind="saved", dtype="bool", requires_grad=False)
    x, residual = (sketch.value(name, B, S, H, kind="input") for name in ("x", "residual"))
    y = sketch.op("y", "dropout", (x, 0.1, True), B, S, H, saved=("mask",))
    sketch.op("z", "add", (residual, y), B, S, H)
    forward, backward = both(sketch)
    assert forward == [3 * WHOLE + MASK]
    assert backward == [WHOLE + MASK + 2 * WHOLE]  # the gradient, the mask; gradients of both that came in


def weights(*, is_masked: bool) -> Sketch:
    sketch = Sketch(B)
    x = sketch.value("x", B, S, H, kind="input")
    if is_masked:
        ahead = sketch.value("ahead", S, H, kind="input", dtype="bool", requires_grad=False)
        x = sketch.op("m", "masked_fill", (sketch.op("s", "mul", (x, 0.5), B, S, H), ahead, -1e4), B, S, H)
    sketch.op("p", "softmax", (x, -1), B, S, H, saved=("p",))
    return sketch


def test_a_softmax_ends_a_chain() -> None:
    sketch = weights(is_masked=True)
    sketch.op("d", "gelu", (Ref("p"),), B, S, H, saved=("p",))
    forward, _ = both(sketch)
    assert forward == [2 * WHOLE + S * H, 2 * WHOLE]


def test_a_kept_output_is_read_backward_beside_its_gradient() -> None:
    _, backward = both(weights(is_masked=True))
    assert backward == [3 * WHOLE]


def test_a_softmax_alone_is_what_it_is_in_eager_mode() -> None:
    assert both(weights(is_masked=False)) == ([2 * WHOLE], [3 * WHOLE])


def test_a_product_between_two_chains_keeps_them_apart() -> None:
    sketch = added_and_gelu()
    sketch.op("after", "gelu", (Ref("out"),), B, S, H, saved=("out",))
    forward = [kernel for kernel in kernels(sketch) if not kernel.is_backward]
    assert [kernel.kind for kernel in forward] == ["product", "moved", "product", "moved"]


def test_gradients_of_what_leaves_to_two_readers_are_added() -> None:
    sketch = added_and_gelu()
    sketch.op("more", "linear", (Ref("z"), Ref("v")), B, S, H)
    once, twice = (
        sum(kernel.is_backward and kernel.kind == "moved" for kernel in kernels(s))
        for s in (added_and_gelu(), sketch)
    )
    assert twice == once + 1


def test_a_chain_that_needs_no_gradient_runs_forward_only() -> None:
    sketch = added_and_gelu()
    sketch.values = {name: replace(value, requires_grad=False) for name, value in sketch.values.items()}
    assert not any(kernel.is_backward for kernel in kernels(sketch))


@pytest.mark.parametrize("microbatch", [1, 4])
def test_compiling_a_model_moves_less_and_computes_the_same(microbatch: int) -> None:
    graph = toy_graph(num_layers=3)
    eager, compiled = (
        profile(
            fold(graph), round_machine(), tp=1, microbatch=microbatch, sequence=16, is_compiled=is_compiled
        )
        for is_compiled in (False, True)
    )
    for a, b in zip(eager.units, compiled.units, strict=True):
        assert b.forward_s + b.backward_s <= a.forward_s + a.backward_s
        assert (b.forward_flops, b.backward_flops) == (a.forward_flops, a.backward_flops)
