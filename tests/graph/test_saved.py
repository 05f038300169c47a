"""Bytes kept for backward, and what recomputing costs, are what real runs of the eager models show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from operator import attrgetter

import pytest
from tests.graph.accounting_cases import case_of, measure, measure_checkpoint
from tests.graph.families import FAMILIES, source_of
from tests.graph.small_graphs import call, graph, value

from shardstage.graph import ModelGraph
from shardstage.graph.blocks import find_blocks
from shardstage.graph.capture import capture
from shardstage.graph.cuts import cut, good_positions
from shardstage.graph.flops import backward_flops
from shardstage.graph.recompute import PartialRecompute, Recompute, StageRecompute
from shardstage.graph.saved import (
    SELECTIVE_TARGETS,
    peak_extra_bytes,
    recompute_flops,
    saved_bytes,
    saved_input_bytes,
    saved_values,
    transient_bytes,
)
from shardstage.graph.saved_trace import trace_saved

GraphOf = Callable[[str], ModelGraph]
CHOICES: tuple[Recompute, ...] = ("none", "selective", "full")
PARTIAL: tuple[StageRecompute, ...] = (
    PartialRecompute(full=1),
    PartialRecompute(selective=2),
    PartialRecompute(full=1, selective=1),
    PartialRecompute(full=2, selective=None),
)


def whole(found: ModelGraph) -> tuple[ModelGraph, int, int]:
    return found, 0, len(found.ops)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_keeps_what_autograd_saves_in_a_real_run(graph_of: GraphOf, name: str) -> None:
    found = case_of(source_of(name), graph_of(name))
    seen = measure(found)
    assert saved_bytes(*whole(found.graph), "none") == pytest.approx(seen.saved_bytes, rel=0.03)
    assert saved_input_bytes(*whole(found.graph), "none") == seen.saved_input_bytes


@pytest.mark.parametrize(
    ("name", "layers"),
    [("llama-tiny", "model.layers"), ("gpt2-tiny", "transformer.h"), ("vit-tiny", "vit.layers")],
)
def test_checkpointed_layers_keep_and_recompute_what_a_real_run_does(
    graph_of: GraphOf, name: str, layers: str
) -> None:
    found = case_of(source_of(name), graph_of(name))
    once = sum(backward_flops(found.graph, op) for op in found.graph.ops)
    for recompute in (*CHOICES, *PARTIAL):
        seen = measure_checkpoint(found, list(attrgetter(layers)(found.model)), recompute)
        kept_bytes = saved_bytes(*whole(found.graph), recompute)
        assert kept_bytes == pytest.approx(seen.kept_bytes, rel=0.005)
        assert once + recompute_flops(*whole(found.graph), recompute) == seen.backward_flops


@pytest.mark.parametrize("name", ["llama-tiny", "unet"])
def test_a_scaled_graph_keeps_what_one_captured_at_that_size_does(graph_of: GraphOf, name: str) -> None:
    sequence = None if name == "unet" else 24
    direct = capture(source_of(name), microbatch=3, sequence=sequence)
    scaled = graph_of(name).at(microbatch=3, sequence=sequence)
    for recompute in CHOICES:
        assert saved_bytes(*whole(scaled), recompute) == saved_bytes(*whole(direct), recompute)


@pytest.mark.parametrize("name", ["llama-tiny", "bert-tiny", "t5-tiny", "unet", "resnet"])
def test_recomputing_more_keeps_less(graph_of: GraphOf, name: str) -> None:
    none, selective, full = (saved_bytes(*whole(graph_of(name)), recompute) for recompute in CHOICES)
    assert full < selective < none


def test_a_stage_keeps_less_with_every_layer_that_recomputes(graph_of: GraphOf) -> None:
    found = graph_of("llama-tiny")
    num_layers = sum(block.is_layer for block in find_blocks(found))
    none, selective, full = (saved_bytes(*whole(found), recompute) for recompute in CHOICES)
    kept = [saved_bytes(*whole(found), PartialRecompute(full=n)) for n in range(1, num_layers + 2)]
    assert none > kept[0] and all(a > b for a, b in pairwise(kept[:num_layers]))
    assert kept[num_layers - 1] == kept[num_layers] == full
    assert saved_bytes(*whole(found), PartialRecompute(selective=num_layers)) == selective
    one = PartialRecompute(full=1, selective=None)
    assert full < saved_bytes(*whole(found), one) < selective


def test_without_recompute_nothing_is_computed_again(graph_of: GraphOf) -> None:
    found = graph_of("llama-tiny")
    assert recompute_flops(*whole(found), "none") == 0
    assert peak_extra_bytes(*whole(found), "none") == 0


def test_a_layer_recomputed_alone_brings_back_all_that_it_did_not_keep(graph_of: GraphOf) -> None:
    found = graph_of("gpt2-tiny")
    layer = next(block for block in find_blocks(found) if block.is_layer)
    kept = set(saved_values(*whole(found), "full"))
    back = set(saved_values(found, layer.start, layer.stop, "none")) - kept
    assert peak_extra_bytes(*whole(found), "full") == sum(found.values[name].num_bytes for name in back)


def test_the_head_and_its_loss_are_never_recomputed(graph_of: GraphOf) -> None:
    found = graph_of("llama-tiny")
    head = find_blocks(found)[-1]
    kept = {recompute: saved_bytes(found, head.start, head.stop, recompute) for recompute in CHOICES}
    assert kept["none"] == kept["selective"] == kept["full"] > 0


def test_the_logits_are_the_largest_working_set_of_a_large_vocabulary() -> None:
    values = [
        value("x", (4, 8), kind="input", requires_grad=True),
        value("w", (1000, 8), kind="parameter", requires_grad=True),
        value("logits", (4, 1000), requires_grad=True),
        value("loss", (), requires_grad=True),
        value("loss#saved0", (4, 1000), kind="saved"),
    ]
    ops = [
        call("logits", "aten.linear.default", "x", "w", saved=("x", "w")),
        call("loss", "aten.cross_entropy_loss.default", "logits", saved=("loss#saved0",)),
    ]
    found = graph(ops, values, output="loss")
    assert transient_bytes(found, 0, 1) == 4 * (4 * 8 + 4 * 1000)
    assert transient_bytes(*whole(found)) == 4 * (2 * 4 * 1000 + 1)


@pytest.mark.parametrize(
    ("target", "own", "kept"),
    [
        ("aten.scaled_dot_product_attention.default", {"log_sum_exp": (2, 4, 6)}, ("y", "log_sum_exp")),
        (
            "shardstage.attention",
            {"query": (2, 4, 6, 8), "scores": (2, 4, 6, 5), "dropped": (2, 4, 6, 5)},
            ("y", "scores"),
        ),
    ],
    ids=["fused", "written out"],
)
def test_selective_recompute_keeps_the_results_of_the_products_in_attention(
    target: str, own: dict[str, tuple[int, ...]], kept: tuple[str, ...]
) -> None:
    key = value("k", (2, 4, 5, 8), kind="input", requires_grad=True)
    values = [
        value("q", (2, 4, 6, 8), kind="input", requires_grad=True),
        key,
        replace(key, name="v"),
        value("y", (2, 4, 6, 8), requires_grad=True),
        *(value(name, shape, kind="saved") for name, shape in own.items()),
    ]
    found = graph([call("y", target, "q", "k", "v", saved=("q", "k", "v", *own))], values, output="y")
    assert saved_values(*whole(found), "selective") == ("q", "k", "v", *kept)


def views() -> ModelGraph:
    """A tensor that is saved twice through views, and a part of it once more."""
    values = [
        value("ids", (4,), kind="input", dtype="int64"),
        value("w", (8, 8), kind="parameter", requires_grad=True),
        value("h", (4, 8), requires_grad=True),
        value("flat", (32,), requires_grad=True, alias_of="h"),
        value("half", (16,), requires_grad=True, alias_of="flat"),
        value("y", (16,), requires_grad=True),
        value("z", (16,), requires_grad=True),
        value("z#saved0", (16,), kind="saved"),
    ]
    ops = [
        call("h", "aten.embedding.default", "w", "ids", saved=("ids",)),
        call("flat", "aten.view.default", "h"),
        call("half", "aten.slice.Tensor", "flat"),
        call("y", "aten.mul.Tensor", "half", "flat", saved=("half", "flat")),
        call("z", "aten.softmax.int", "y", "h", saved=("z#saved0", "h", "w")),
    ]
    return graph(ops, values, output="z")


def test_a_storage_counts_once_however_many_views_are_saved() -> None:
    assert saved_values(*whole(views()), "none") == ("ids", "h", "z#saved0")
    assert saved_bytes(*whole(views()), "none") == 4 * (4 * 8 + 16)


def test_tokens_are_listed_apart() -> None:
    assert saved_input_bytes(*whole(views()), "none") == 4 * 8


def test_of_a_tensor_of_an_earlier_stage_only_the_view_that_travelled_is_kept() -> None:
    assert saved_values(views(), 3, 5, "none") == ("half", "flat", "z#saved0", "h")


def test_a_stage_keeps_what_it_received(graph_of: GraphOf) -> None:
    found = graph_of("llama-tiny")
    positions = good_positions(found)
    segments = cut(found, (0, positions[2]))
    kept = saved_bytes(*whole(segments[1].graph), "none")
    assert kept == saved_bytes(found, positions[2], len(found.ops), "none")
    assert {edge.value for edge in segments[1].receives} <= set(
        saved_values(*whole(segments[1].graph), "none")
    )


def test_stages_together_keep_no_less_than_the_whole(graph_of: GraphOf) -> None:
    found = graph_of("t5-tiny")
    bounds = [0, *good_positions(found), len(found.ops)]
    for recompute in CHOICES:
        parts = [saved_bytes(found, a, b, recompute) for a, b in pairwise(bounds)]
        assert sum(parts) >= saved_bytes(*whole(found), recompute)


def test_blocks_given_spare_finding_them(graph_of: GraphOf) -> None:
    found = graph_of("llama-tiny")
    blocks = find_blocks(found)
    for recompute in CHOICES:
        assert saved_bytes(*whole(found), recompute, blocks=blocks) == saved_bytes(*whole(found), recompute)


def test_what_autograd_keeps_besides_has_a_name_and_a_size(graph_of: GraphOf) -> None:
    found = graph_of("llama-tiny").at(microbatch=2, sequence=16)
    op = next(op for op in found.ops if op.target == "aten.scaled_dot_product_attention.default")
    (log_sum_exp,) = (name for name in op.saved if found.values[name].kind == "saved")
    assert log_sum_exp == f"{op.name}#saved0"
    assert found.values[log_sum_exp].shape == (2, 8, 16)


def test_tracing_again_finds_the_same(graph_of: GraphOf) -> None:
    found = graph_of("gpt2-tiny")
    again = trace_saved(found)
    assert again.ops == found.ops
    assert again.values == found.values


def test_operators_of_our_own_keep_what_they_say() -> None:
    values = [value("x", kind="input", requires_grad=True), value("y", requires_grad=True)]
    op = call("y", "shardstage.all_reduce", "x", saved=("x",))
    assert trace_saved(graph([op], values, output="y")).ops == (op,)


def test_a_norm_keeps_its_input_and_two_statistics() -> None:
    values = [
        value("x", (2, 3, 4), kind="input", requires_grad=True),
        value("w", (4,), kind="parameter", requires_grad=True),
        value("b", (4,), kind="parameter", requires_grad=True),
        value("y", (2, 3, 4), requires_grad=True),
    ]
    op = call("y", "aten.layer_norm.default", "x", (4,), "w", "b")
    traced = trace_saved(graph([replace(op, args=(op.args[0], (4,), *op.args[2:]))], values, output="y"))
    own = [name for name in traced.ops[0].saved if traced.values[name].kind == "saved"]
    assert own == ["y#saved0", "y#saved1"]
    assert {traced.values[name].shape for name in own} == {(2, 3, 1)}


def test_what_needs_no_gradient_keeps_nothing() -> None:
    values = [value("x", kind="input"), value("y")]
    traced = trace_saved(graph([call("y", "aten.mul.Tensor", "x", "x")], values, output="y"))
    assert traced.ops[0].saved == ()


def test_a_tensor_changed_in_place_can_be_traced() -> None:
    values = [
        value("x", kind="input", requires_grad=True),
        value("y", requires_grad=True),
        value("r", requires_grad=True, alias_of="y"),
    ]
    ops = [call("y", "aten.sin.default", "x"), call("r", "aten.relu_.default", "y")]
    traced = trace_saved(graph(ops, values, output="r"))
    assert [op.saved for op in traced.ops] == [("x",), ("y",)]


def test_selective_targets_are_names_that_torch_knows() -> None:
    import torch

    for target in SELECTIVE_TARGETS:
        namespace, name, *overload = target.split(".")
        if namespace == "aten":
            assert hasattr(getattr(torch.ops.aten, name), overload[0])
