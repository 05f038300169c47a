"""Attention that is written out: what its kernels compute and move, added up by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.cost.machines import round_machine
from tests.graph.attention_models import KEY_HEADS, Form, attention_graph
from tests.graph.small_graphs import call, graph, value

from shardstage.cost import Profiler, fold
from shardstage.cost.kernels import Kernel, KernelReader
from shardstage.graph import ModelGraph, Op
from shardstage.graph.attention import ATTENTION
from shardstage.graph.flops import backward_flops, forward_flops
from shardstage.graph.saved_on import saved_on
from shardstage.graph.saved_trace import trace_saved
from shardstage.sharding.kept import kept_of

B, H, S, T, D = 2, 3, 5, 7, 8


def dropping(dtype: str, *, is_causal: bool = False) -> tuple[ModelGraph, Op]:
    values = [
        value(name, (B, H, n, D), kind="input", requires_grad=True, dtype=dtype)
        for name, n in zip("qkv", (S, T, T), strict=True)
    ]
    values.append(value("y", (B, H, S, D), requires_grad=True, dtype=dtype))
    op = call("y", "shardstage.attention", "q", "k", "v")
    op = replace(op, args=(*op.args, None, 0.1, is_causal, None, False, 0, H, ((0, H),)))
    kept = kept_of(op, {each.name: each for each in values})
    assert kept is not None
    names, made = kept
    op = replace(op, saved=(*names, *(each.name for each in made)))
    return replace(graph([op], [*values, *made], output="y"), microbatch=B), op


def kernels_of(found: ModelGraph, op: Op) -> tuple[list[Kernel], list[Kernel]]:
    every = KernelReader(found, lambda name: False).kernels(op)
    return [k for k in every if not k.is_backward], [k for k in every if k.is_backward]


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2)])
def test_attention_with_dropout_moves_its_scores_from_kernel_to_kernel(dtype: str, width: int) -> None:
    forward, backward = kernels_of(*dropping(dtype))
    scores = H * S * T
    casts = [width + 4] if width == 2 else []
    over_scores = [k.sample_bytes / scores for k in forward if k.kind == "moved"]
    assert over_scores == [width + 4, *casts, 4, 5, 2 * width + 1, 2 * width]
    over_scores = [k.sample_bytes / scores for k in backward if k.kind == "moved"]
    assert over_scores == [2 * width + 1, 2 * width, *casts, 8 + width]
    rows = width * H * D
    products = [(k.sizes(B), k.sample_bytes) for k in (*forward, *backward) if k.kind == "product"]
    assert products == [
        ((S, T, D, B * H), rows * (S + T) + width * scores),
        ((S, D, T, B * H), rows * (S + T) + width * scores),
        ((S, T, D, B * H), rows * (S + T) + width * scores),
        ((T, D, S, B * H), rows * (S + T) + width * scores),
        ((S, D, T, B * H), rows * (S + T) + width * scores),
        ((S, T, D, B * H), rows * (S + T) + width * scores),
    ]


def test_a_causal_mask_is_a_kernel_each_way() -> None:
    plain, causal = (kernels_of(*dropping("bfloat16", is_causal=causal)) for causal in (False, True))
    assert [len(b) - len(a) for a, b in zip(plain, causal, strict=True)] == [1, 1]


def test_its_products_are_the_flops_of_attention() -> None:
    found, op = dropping("float32")
    flops = [
        sum(2 * m * n * k * count for m, n, k, count in (k.sizes(B) for k in part if k.kind == "product"))
        for part in kernels_of(found, op)
    ]
    assert flops == [4 * B * H * S * T * D, 8 * B * H * S * T * D]
    assert flops[0] == forward_flops(found, op) and flops[1] == pytest.approx(
        backward_flops(found, op), rel=0.26
    )


def test_only_a_device_without_a_kernel_writes_it_out() -> None:
    """Values of fewer features have a kernel on a GPU, grouped queries in float32 on a CPU."""
    cases: tuple[tuple[str, Form, str], ...] = (
        ("bfloat16", "latent", "cpu"),
        ("float32", "grouped", "cuda"),
        ("bfloat16", "grouped", ""),
    )
    for dtype, form, written_out in cases:
        captured = attention_graph(dtype, form).at(microbatch=2, sequence=64)
        for kind in ("cpu", "cuda"):
            found = saved_on(captured, kind)
            op = next(op for op in found.ops if op.target == ATTENTION)
            kinds = {kernel.kind for part in kernels_of(found, op) for kernel in part}
            assert kinds == ({"product", "moved"} if kind == written_out else {"attention"})


def test_without_gradients_nothing_runs_backward() -> None:
    values = [value(name, (B, H, S, D), kind="input", dtype="float64") for name in "qkv"]
    found = trace_saved(
        graph(
            [call("y", ATTENTION, "q", "k", "v")],
            [*values, value("y", (B, H, S, D), dtype="float64")],
            output="y",
        )
    )
    assert kernels_of(found, found.ops[0])[1] == []


def test_a_layer_without_a_kernel_for_its_attention_takes_longer() -> None:
    """Two layers in float32 on a GPU whose queries share keys, beside the same where values have fewer features."""
    seconds, forms = {}, tuple(KEY_HEADS)
    for form in forms:
        folded = fold(attention_graph("float32", form))
        units = Profiler(folded, round_machine(1), tp=1, sequence=512).at(8).units
        seconds[form] = sum(unit.forward_s + unit.backward_s for unit in units)
    assert seconds["grouped"] > 1.2 * seconds["latent"]
