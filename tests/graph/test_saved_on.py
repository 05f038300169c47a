"""What autograd keeps on a CUDA device, where that is not what it keeps on the CPU of the capture."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.graph.attention_models import attention_graph, kept_of_attention
from tests.graph.norm_models import kept_bytes, norm_graph
from tests.graph.small_graphs import call, graph, value
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from shardstage.graph import ModelGraph
from shardstage.graph.attention import ATTENTION
from shardstage.graph.recompute import Recompute
from shardstage.graph.saved import peak_extra_bytes, saved_bytes
from shardstage.graph.saved_on import attention_kernel, is_fused, saved_on
from shardstage.graph.saved_trace import trace_saved


def norm_of(
    *, x: str = "bfloat16", weight: str | None = "bfloat16", dims: int = 1, requires_grad: bool = True
) -> ModelGraph:
    shape = (2, 3, 4)
    values = [
        value("x", shape, kind="input", requires_grad=requires_grad, dtype=x),
        value("y", shape, requires_grad=requires_grad, dtype=x),
    ]
    arguments: list[Any] = ["x"]
    if weight is not None:
        stored = value("w", shape[-dims:], kind="parameter", requires_grad=requires_grad, dtype=weight)
        values.append(stored)
        arguments.append("w")
    op = call("y", "aten.rms_norm.default", *arguments)
    args = (op.args[0], shape[-dims:], *op.args[1:])
    return trace_saved(graph([replace(op, args=args)], values, output="y"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_two_layers_keep_what_is_added_up_by_hand(dtype: str, kind: str) -> None:
    found = saved_on(norm_graph(dtype).at(microbatch=2, sequence=8), kind)
    assert saved_bytes(found, 0, len(found.ops), "none") == kept_bytes(dtype, kind, num_rows=16)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_scaling_before_and_after_is_the_same(recompute: Recompute) -> None:
    whole = norm_graph("bfloat16")
    before = saved_on(whole, "cuda").at(microbatch=3, sequence=5)
    after = saved_on(whole.at(microbatch=3, sequence=5), "cuda")
    assert before.values == after.values
    assert before.ops == after.ops
    for found in (before, after):
        assert saved_bytes(found, 0, len(found.ops), recompute) <= saved_bytes(
            found, 0, len(found.ops), "none"
        )


def test_a_layer_that_is_recomputed_brings_less_back_on_a_gpu() -> None:
    cpu = norm_graph("bfloat16").at(microbatch=2, sequence=8)
    gpu = saved_on(cpu, "cuda")
    back = [peak_extra_bytes(each, 0, len(each.ops), "full") for each in (cpu, gpu)]
    result, number, wide = 2 * 16 * 16, 4 * 16, 4 * 16 * 16
    assert back == [2 * wide + number + result, number + result]


def test_a_cpu_s_graph_is_the_captured_one_itself() -> None:
    found = norm_graph("float32")
    assert saved_on(found, "cpu") is found


def test_a_graph_without_such_ops_is_the_same_on_every_device() -> None:
    found = graph([call("y", "aten.sin.default", "x", saved=("x",))], [value("x"), value("y")], output="y")
    assert saved_on(found, "cuda") is found


def test_cuda_keeps_input_weight_and_a_number_a_row() -> None:
    found = saved_on(norm_of(), "cuda")
    assert found.ops[0].saved == ("x", "w", "y#reciprocal_rms")
    own = {name: kept for name, kept in found.values.items() if kept.kind == "saved"}
    assert {name: (kept.shape, kept.dtype) for name, kept in own.items()} == {
        "y#reciprocal_rms": ((2, 3, 1), "float32")
    }


def test_of_several_dims_that_are_normalised_there_is_one_number() -> None:
    found = saved_on(norm_of(x="float64", weight="float64", dims=2), "cuda")
    kept = found.values["y#reciprocal_rms"]
    assert (kept.shape, kept.dtype) == ((2, 1, 1), "float64")


def test_a_norm_without_a_weight_is_fused_too() -> None:
    assert saved_on(norm_of(weight=None), "cuda").ops[0].saved == ("x", "y#reciprocal_rms")


def test_a_weight_of_another_dtype_leaves_torch_to_its_parts() -> None:
    assert not is_fused("bfloat16", "float32") and not is_fused("complex64", "complex64")
    found = norm_of(weight="float32")
    assert saved_on(found, "cuda") is found


def test_a_norm_that_needs_no_gradient_keeps_nothing() -> None:
    found = norm_of(requires_grad=False)
    assert found.ops[0].saved == ()
    assert saved_on(found, "cuda") is found


def test_asking_twice_is_asking_once() -> None:
    once = saved_on(norm_graph("float32"), "cuda")
    twice = saved_on(once, "cuda")
    assert (twice.ops, twice.values) == (once.ops, once.values)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_of_fewer_features_are_attended_to_by_a_kernel(dtype: str) -> None:
    """DeepSeek's attention was priced on GPUs with its scores in float32, which only a CPU writes down."""
    found = attention_graph(dtype).at(microbatch=2, sequence=64)
    on_gpu, on_cpu = (
        saved_bytes(saved_on(found, kind), 0, len(found.ops), "none") for kind in ("cuda", "cpu")
    )
    assert on_gpu == kept_of_attention(dtype, num_samples=2, sequence=64)
    scores = 2 * 2 * 2 * 64 * 64 * 4
    assert on_cpu > on_gpu + 0.9 * scores


def test_what_a_kernel_of_attention_keeps_grows_with_the_tokens_not_with_their_square() -> None:
    found = attention_graph("bfloat16")
    short, long = (
        saved_bytes(saved_on(found, "cuda").at(microbatch=2, sequence=s), 0, len(found.ops), "none")
        for s in (8, 80)
    )
    assert long == 10 * short


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_attention_scales_before_and_after_alike(recompute: Recompute) -> None:
    whole = attention_graph("bfloat16")
    before, after = (
        saved_on(whole, "cuda").at(microbatch=3, sequence=5),
        saved_on(whole.at(microbatch=3, sequence=5), "cuda"),
    )
    assert (before.values, before.ops) == (after.values, after.ops)
    assert saved_bytes(before, 0, len(before.ops), recompute) > 0


def test_heads_that_lie_side_by_side_are_not_copied() -> None:
    cpu = attention_graph("bfloat16")
    gpu = saved_on(cpu, "cuda")
    flat = [
        op.outputs[0] for op in cpu.ops if op.target == "aten.flatten.using_ints" and "layers" in op.module
    ]
    assert len(flat) == 2
    assert [cpu.values[name].alias_of for name in flat if name] == ["", ""]
    assert all(gpu.values[name].alias_of for name in flat if name)


def attention_of(
    *,
    query: int = 24,
    value_: int = 16,
    key_heads: int = 2,
    dtype: str = "bfloat16",
    mask: Any = None,
    **keywords: Any,
) -> ModelGraph:
    shapes = {"q": (2, 2, 6, query), "k": (2, key_heads, 6, query), "v": (2, key_heads, 6, value_)}
    values = [
        value(name, shape, kind="input", requires_grad=True, dtype=dtype) for name, shape in shapes.items()
    ]
    values.append(value("y", (2, 2, 6, value_), requires_grad=True, dtype=dtype))
    if mask is not None:
        values.append(mask)
    op = call(
        "y",
        "aten.scaled_dot_product_attention.default",
        "q",
        "k",
        "v",
        *(["mask"] if mask is not None else []),
    )
    return trace_saved(graph([replace(op, kwargs=tuple(keywords.items()))], values, output="y"))


def test_of_unlike_heads_inputs_result_and_a_number_a_row_are_kept() -> None:
    found = saved_on(attention_of(), "cuda")
    assert found.ops[0].saved == ("q", "k", "v", "y", "y#logsumexp")
    assert found.values["y#logsumexp"].shape == (2, 2, 6)
    assert [name for name, each in found.values.items() if each.kind == "saved"] == ["y#logsumexp"]


def test_a_mask_of_numbers_is_kept_itself_one_of_truth_values_as_numbers() -> None:
    numbers = attention_of(mask=value("mask", (6, 6), kind="input", dtype="bfloat16"))
    assert saved_on(numbers, "cuda").ops[0].saved == ("q", "k", "v", "mask", "y", "y#logsumexp")
    truths = saved_on(attention_of(mask=value("mask", (6, 6), kind="input", dtype="bool")), "cuda")
    assert truths.ops[0].saved == ("q", "k", "v", "y#bias", "y", "y#logsumexp")
    assert (truths.values["y#bias"].shape, truths.values["y#bias"].dtype) == ((6, 6), "bfloat16")


@pytest.mark.parametrize(
    "asked",
    [
        {"value_": 24},  # by a kernel on both
        {"key_heads": 1, "value_": 24, "enable_gqa": True},
        {"query": 20},  # no multiple of 8: written out on both
        {"key_heads": 1, "enable_gqa": True},
        {"dtype": "float64"},
        {"mask": value("mask", (6, 6), kind="input", requires_grad=True, dtype="bfloat16")},
    ],
)
def test_attention_that_both_compute_alike_is_as_on_a_cpu(asked: dict[str, Any]) -> None:
    found = attention_of(**asked)
    assert saved_on(found, "cuda") is found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_grouped_queries_in_float32_are_written_out_on_a_gpu(dtype: str) -> None:
    """Llama in float32 was planned on GPUs as if they had a kernel for it: 8.6 GB short for each layer of 8,192 tokens and 32 heads."""
    found = saved_on(attention_graph(dtype, "grouped").at(microbatch=2, sequence=40), "cuda")
    by_hand = kept_of_attention(dtype, num_samples=2, sequence=40, form="grouped")
    assert saved_bytes(found, 0, len(found.ops), "none") == by_hand


@pytest.mark.parametrize(
    ("dtype", "mask", "key_heads"),
    [
        ("float32", False, 1),
        ("float64", False, 2),
        ("bfloat16", True, 1),  # Flash takes no mask, the efficient kernel no groups
    ],
)
def test_what_is_written_out_keeps_what_torch_keeps(dtype: str, mask: bool, key_heads: int) -> None:
    """Torch's own form of it, run on a CPU: bytes of the tensors that are neither given nor returned."""
    number = getattr(torch, dtype)
    q, k, v = (
        torch.ones(2, heads, tokens, 24, dtype=number, requires_grad=True)
        for heads, tokens in ((2, 6), (key_heads, 7), (key_heads, 7))
    )
    bias = torch.zeros(6, 7, dtype=number) if mask else None
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with sdpa_kernel(SDPBackend.MATH), saved_tensors_hooks(keep, lambda tensor: tensor):
        scaled_dot_product_attention(q, k, v, bias, enable_gqa=key_heads == 1)
    for given in (q, k, v):
        kept.pop(given.data_ptr(), None)
    values = [
        value("q", tuple(q.shape), kind="input", requires_grad=True, dtype=dtype),
        value("k", tuple(k.shape), kind="input", requires_grad=True, dtype=dtype),
        value("v", tuple(v.shape), kind="input", requires_grad=True, dtype=dtype),
        value("y", tuple(q.shape), requires_grad=True, dtype=dtype),
        *([value("mask", (6, 7), kind="input", dtype=dtype)] if mask else []),
    ]
    op = call("y", ATTENTION, "q", "k", "v", *(["mask"] if mask else []))
    op = replace(op, kwargs=(("enable_gqa", key_heads == 1),))
    found = saved_on(trace_saved(graph([op], values, output="y")), "cuda")
    own = [found.values[name] for name in found.ops[0].saved if found.values[name].kind == "saved"]
    assert sum(each.num_bytes for each in own) == sum(kept.values())
    assert "y" not in found.ops[0].saved


@pytest.mark.parametrize(
    ("features", "dtype", "has_mask", "kernel"),
    [
        ((24, 24), "bfloat16", False, "flash"),
        ((24, 24), "bfloat16", True, "efficient"),
        ((20, 20), "bfloat16", True, "written out"),
        ((264, 264), "bfloat16", False, "efficient"),
        ((24, 16), "bfloat16", False, "efficient"),
        ((20, 12), "float32", False, "efficient"),
        ((20, 12), "bfloat16", False, "written out"),
        ((18, 18), "float32", False, "written out"),
        ((24, 24), "float64", False, "written out"),
    ],
)
def test_the_kernel_follows_features_dtype_and_mask(
    features: tuple[int, int], dtype: str, has_mask: bool, kernel: str
) -> None:
    shapes = [(2, 2, 6, features[0])] * 2 + [(2, 2, 6, features[1])]
    assert attention_kernel(*shapes, dtype, has_mask=has_mask) == kernel
    without_heads = [shape[1:] for shape in shapes]
    assert attention_kernel(*without_heads, dtype, has_mask=has_mask) == "written out"


@pytest.mark.parametrize(
    ("features", "dtype", "key_heads", "kernel"),
    [
        (24, "float16", 2, "efficient"),  # flash from 8.0 on
        (20, "float16", 2, "written out"),
        (24, "float16", 1, "written out"),  # grouped queries
        (18, "float32", 2, "efficient"),  # in whole numbers, where there is no TF32
        (24, "bfloat16", 2, "written out"),
    ],
)
def test_before_compute_capability_8_there_is_no_flash_kernel_and_none_for_bfloat16(
    features: int, dtype: str, key_heads: int, kernel: str
) -> None:
    shapes = [(2, heads, 6, features) for heads in (2, key_heads, key_heads)]
    assert attention_kernel(*shapes, dtype, has_mask=False, capability=7.5) == kernel
    newer = attention_kernel(*shapes, dtype, has_mask=False, capability=8.0)
    assert newer == attention_kernel(*shapes, dtype, has_mask=False)


def test_a_v100_keeps_the_scores_of_what_it_writes_out() -> None:
    """Two tensors of scores in float32 a head, or one: what no kernel computes is kept for backward."""
    graph = attention_graph("bfloat16", "grouped").at(microbatch=2, sequence=40)
    old, new = (saved_bytes(saved_on(graph, "cuda", each), 0, len(graph.ops), "none") for each in (7.0, 8.0))
    assert new == kept_of_attention("bfloat16", num_samples=2, sequence=40, form="grouped")
    a_row = 4 * 2 * (3 * 24 + 40) - 2 * (2 * 24 + 2 * 24) - 4 * 2
    assert old - new == 2 * 2 * 40 * a_row
