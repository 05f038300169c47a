"""Named modules: which runs of a layer they are, what these keep and compute again, against real runs and by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
from tests.cost.toy import toy_graph
from tests.graph.accounting_cases import case_of, measure_checkpoint
from tests.graph.families import source_of
from tests.graph.small_graphs import call, graph, value
from torch import nn
from torch.utils.checkpoint import checkpoint

from shardstage.graph import ModelGraph
from shardstage.graph.flops import backward_flops, forward_flops
from shardstage.graph.named_modules import Part, modules_of_layers, recompute_parts
from shardstage.graph.recompute import PartialRecompute
from shardstage.graph.saved import (
    extra_values,
    peak_extra_bytes,
    recompute_flops,
    recomputed_ops,
    saved_bytes,
    saved_values,
)

GraphOf = Callable[[str], ModelGraph]
PLAIN = toy_graph(num_layers=3)
TOY = replace(
    PLAIN,
    ops=tuple(
        replace(op, module=f"{op.module}.act") if op.name.startswith("relu") else op for op in PLAIN.ops
    ),
)


def whole(found: ModelGraph) -> tuple[ModelGraph, int, int]:
    return found, 0, len(found.ops)


def runs_of(found: ModelGraph, *modules: str) -> list[list[str]]:
    """Names of the ops of each run."""
    parts = recompute_parts(found, found.blocks, "selective", modules)
    return [
        [op.name for op in found.ops[part.start : part.stop]]
        for of_block in parts
        for part in of_block
        if part.is_named
    ]


def test_ops_in_matching_modules_that_follow_one_another_are_one_run() -> None:
    assert runs_of(TOY, "*.act") == [["relu_0"], ["relu_1"], ["relu_2"]]
    assert runs_of(TOY, "*.up", "*.act") == [[f"up_{n}", f"relu_{n}"] for n in range(3)]
    assert runs_of(TOY, "layers.[02].act") == [["relu_0"], ["relu_2"]]
    assert runs_of(TOY, "layers") == runs_of(TOY, "embed") == runs_of(TOY, "act") == []


def test_a_run_ends_where_nothing_more_that_it_makes_is_saved() -> None:
    assert runs_of(TOY, "layers.1") == [["up_1", "relu_1", "down_1"]], "add keeps nothing"
    assert runs_of(TOY, "*.up") == runs_of(TOY, "*.down") == [], "these keep their inputs, which stay anyway"


def test_parts_tile_every_block() -> None:
    for modules in ((), ("*.act",), ("*",), ("*.up", "*.act")):
        for recompute in ("none", "selective", "full", PartialRecompute(full=1, selective=1)):
            parts = recompute_parts(TOY, TOY.blocks, recompute, modules)
            for block, of_block in zip(TOY.blocks, parts, strict=True):
                bounds = [at for part in of_block for at in (part.start, part.stop)]
                assert bounds[::2] == [block.start, *bounds[1:-1:2]] and bounds[-1] == block.stop


def test_only_layers_that_recompute_selectively_are_cut() -> None:
    some = PartialRecompute(full=1, selective=1)
    embed, first, second, third, head = recompute_parts(TOY, TOY.blocks, some, ("*.act",))
    assert [embed, first, third, head] == [
        (Part(0, 1, "none"),),
        (Part(1, 5, "full"),),
        (Part(9, 13, "none"),),
        (Part(13, 17, "none"),),
    ]
    assert second == (Part(5, 6, "none"), Part(6, 7, "full", is_named=True), Part(7, 9, "none"))


def test_a_run_keeps_what_was_made_outside_of_it_and_the_rest_what_it_saves() -> None:
    kept = saved_values(*whole(TOY), "selective", modules=("layers.1.down",))
    assert set(kept) == set(saved_values(*whole(TOY), "none"))
    kept = saved_values(*whole(TOY), "selective", modules=("layers.1",))
    assert set(saved_values(*whole(TOY), "none")) - set(kept) == {"relu_1"}
    assert [op.name for op in recomputed_ops(*whole(TOY), "selective", modules=("layers.1",))] == [
        *("up_1", "relu_1")
    ]
    assert list(extra_values(*whole(TOY), "selective", modules=("layers.1",))) == [("relu_1",)]


def test_a_kept_result_comes_back_a_second_time() -> None:
    """tanh saves its result, and so does the product after it: recomputing tanh makes that again."""
    values = [
        value("x", (4, 8), kind="input", requires_grad=True),
        value("w", (8, 8), kind="parameter", requires_grad=True),
        value("t", (4, 8), requires_grad=True),
        value("y", (4, 8), requires_grad=True),
    ]
    ops = [
        replace(call("t", "aten.tanh.default", "x", saved=("t",)), module="act"),
        replace(call("y", "aten.linear.default", "t", "w", saved=("t", "w")), module="proj"),
    ]
    found = graph(ops, values, output="y")
    assert saved_values(*whole(found), "selective", modules=("act",)) == ("x", "t")
    assert peak_extra_bytes(*whole(found), "selective", modules=("act",)) == 4 * 4 * 8


def in_place(*modules: str) -> ModelGraph:
    """x → norm, which changes its statistics → relu in place → sum; the modules of these ops."""
    values = [
        value("x", (4, 8), kind="input", requires_grad=True),
        value("mean", (8,), kind="buffer"),
        value("n", (4, 8), requires_grad=True),
        value("r", (4, 8), requires_grad=True, alias_of="n"),
        value("y", (), requires_grad=True),
    ]
    norm = call("n", "aten.batch_norm.default", "x", "mean", saved=("x",))
    ops = [
        replace(norm, args=(norm.args[0], None, None, norm.args[1], None, True)),
        call("r", "aten.relu_.default", "n", saved=("r",)),
        call("y", "aten.sum.default", "r"),
    ]
    ops = [replace(op, module=module) for op, module in zip(ops, modules, strict=True)]
    return graph(ops, values, output="y")


def test_what_is_changed_in_place_is_recomputed_only_with_its_making() -> None:
    apart = in_place("norm", "act", "")
    assert runs_of(apart, "act") == [], "its input is changed, and was made outside"
    assert runs_of(apart, "*") == [], "a norm's statistics would change twice, and what it makes is changed"
    norm, *others = apart.ops
    made = replace(norm, target="aten.tanh.default", args=norm.args[:1], saved=())
    both = replace(apart, ops=(made, *others))
    assert runs_of(both, "*") == [["n", "r"]]
    assert runs_of(both, "norm") == [], "its result is changed outside"


def test_a_layer_named_as_a_whole_keeps_what_full_keeps(graph_of: GraphOf) -> None:
    found = graph_of("llama-tiny")
    assert saved_bytes(*whole(found), "selective", modules=("*",)) == saved_bytes(*whole(found), "full")
    assert recompute_flops(*whole(found), "selective", modules=("*",)) == recompute_flops(
        *whole(found), "full"
    )


@pytest.mark.parametrize("name", ["llama-tiny", "gpt2-tiny", "t5-tiny", "vit-tiny"])
def test_more_modules_compute_more_again(graph_of: GraphOf, name: str) -> None:
    found = graph_of(name)
    names = dict.fromkeys(path.rpartition(".")[2] for path in modules_of_layers(found))
    globs = [f"*.{each}" for each in names if not each.isdigit()]
    before: set[str] = set()
    for number in range(1, len(globs) + 1):
        again = {op.name for op in recomputed_ops(*whole(found), "selective", modules=globs[:number])}
        assert before <= again
        before = again
    everything = {op.name for op in found.ops}
    assert before and before < everything


@contextmanager
def checkpointed(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """torch's checkpoint around every module whose name ends so."""
    chosen = [module for path, module in model.named_modules() if path.endswith(tuple(names))]
    for module in chosen:
        again = partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)
        vars(module)["forward"] = again
    try:
        yield
    finally:
        for module in chosen:
            vars(module).pop("forward", None)


@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("llama-tiny", (".mlp",)),
        ("llama-tiny", (".self_attn",)),
        ("llama-tiny", ("_layernorm",)),
        ("llama-tiny", ("input_layernorm", ".act_fn", ".o_proj")),
        ("gpt2-tiny", (".mlp",)),
        ("gpt2-tiny", (".attn",)),
        ("gpt2-tiny", (".ln_1", ".act")),
        ("vit-tiny", (".mlp", ".layernorm_before")),
    ],
)
def test_checkpointed_modules_keep_and_recompute_what_a_real_run_does(
    graph_of: GraphOf, name: str, modules: tuple[str, ...]
) -> None:
    found = case_of(source_of(name), graph_of(name))
    globs = tuple(f"*{each}" for each in modules)
    with checkpointed(found.model, modules):
        seen = measure_checkpoint(found, (), "none")
    once = sum(backward_flops(found.graph, op) for op in found.graph.ops)
    assert saved_bytes(*whole(found.graph), "selective", modules=globs) == pytest.approx(
        seen.kept_bytes, rel=0.005
    )
    assert once + recompute_flops(*whole(found.graph), "selective", modules=globs) == seen.backward_flops


def test_flops_of_a_run_are_those_of_its_products(graph_of: GraphOf) -> None:
    found = graph_of("llama-tiny")
    products = [op for op in found.ops if op.module.endswith((".gate_proj", ".up_proj"))]
    again = recompute_flops(*whole(found), "selective", modules=("*.mlp",))
    assert again == sum(forward_flops(found, op) for op in products), "down_proj needs its inputs alone"
