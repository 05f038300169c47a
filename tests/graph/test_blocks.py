"""Layers are found by the paths of modules alone, in every family, and equal ones are told to be equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from tests.graph.families import FAMILIES
from tests.graph.small_graphs import call, graph, value

from shardstage.graph import ModelGraph, Op
from shardstage.graph.blocks import find_blocks, fingerprint, fold, within

GraphOf = Callable[[str], ModelGraph]


def model(modules: Sequence[str], *, width: int = 3, widths: Sequence[int] = ()) -> ModelGraph:
    """A linear op, a sine and an addition of its input per path; ``name!`` is a lone addition. ``widths`` are those of each path."""
    ops: list[Op] = []
    values = [value("h", (2, width), kind="input"), value("w", (width, width), kind="parameter")]
    last = "h"
    for number, path in enumerate(modules):
        width = widths[number] if widths else width
        if not path.endswith("!"):
            ops.append(call(f"x{number}", "aten.linear.default", last, "w", module=f"{path}.proj"))
            ops.append(call(f"s{number}", "aten.sin.default", f"x{number}", module=path))
            values += [value(f"x{number}", (2, width)), value(f"s{number}", (2, width))]
            other = f"s{number}"
        else:
            other = last
        ops.append(call(f"h{number}", "aten.add.Tensor", last, other, module=path.rstrip("!")))
        values.append(value(f"h{number}", (2, width)))
        last = f"h{number}"
    return graph(ops, values, output=last)


def layers_of(found: ModelGraph) -> list[str]:
    return [block.module for block in find_blocks(found) if block.is_layer]


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_tile_all_ops(graph_of: GraphOf, name: str) -> None:
    blocks = find_blocks(graph_of(name))
    assert [block.start for block in blocks] == [0, *(block.stop for block in blocks[:-1])]
    assert blocks[-1].stop == len(graph_of(name).ops)
    assert all(block.start < block.stop for block in blocks)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("llama-tiny", ["model.layers.0", "model.layers.1"]),
        ("mixtral-tiny", ["model.layers.0", "model.layers.1"]),
        ("gpt2-tiny", ["transformer.h.0", "transformer.h.1"]),
        ("bert-tiny", ["bert.encoder.layer.0", "bert.encoder.layer.1"]),
        ("t5-tiny", [f"{side}.block.{i}" for side in ("encoder", "decoder") for i in range(2)]),
        ("unet", ["down1", "down2", "bottom", "up2", "up1"]),
        ("resnet", ["layer1.0", "layer1.1", "layer2.0", "layer2.1"]),
    ],
)
def test_the_layers_of_a_family_are_its_repeated_modules(
    graph_of: GraphOf, name: str, layers: list[str]
) -> None:
    assert layers_of(graph_of(name)) == layers


def test_vision_layers_are_found_behind_the_patch_embedding(graph_of: GraphOf) -> None:
    blocks = find_blocks(graph_of("vit-tiny"))
    assert [block.is_layer for block in blocks] == [False, True, True, False]
    assert len({block.kind for block in blocks[1:3]}) == 1


def test_a_recurrent_model_is_one_block(graph_of: GraphOf) -> None:
    (block,) = find_blocks(graph_of("lstm"))
    assert block.is_layer


@pytest.mark.parametrize("name", ["llama-tiny", "gpt2-tiny", "bert-tiny", "mixtral-tiny"])
def test_identical_layers_share_a_kind_and_fold(graph_of: GraphOf, name: str) -> None:
    blocks = find_blocks(graph_of(name))
    assert [count for _, count in fold(blocks)] == [1, 2, 1]


def test_the_first_layer_of_t5_has_a_kind_of_its_own_for_it_makes_the_bias(graph_of: GraphOf) -> None:
    counts = [count for _, count in fold(b for b in find_blocks(graph_of("t5-tiny")) if b.is_layer)]
    assert counts == [1, 1, 1, 1]


def test_embedding_and_head_are_no_layers(graph_of: GraphOf) -> None:
    first, *_, last = find_blocks(graph_of("gpt2-tiny"))
    assert (first.is_layer, last.is_layer) == (False, False)


def test_of_nested_lists_the_outermost_that_repeats_counts() -> None:
    stacked = [f"block.{i}.layer.{j}" for i in range(3) for j in range(2)]
    assert layers_of(model(stacked)) == ["block.0", "block.1", "block.2"]


def test_of_nested_lists_the_inner_counts_where_the_outer_does_not_repeat() -> None:
    depths = (2, 3, 4)
    stages = [f"stages.{i}.blocks.{j}" for i, depth in enumerate(depths) for j in range(depth)]
    widths = [3 + i for i, depth in enumerate(depths) for _ in range(depth)]
    assert layers_of(model(stages, widths=widths)) == stages


def test_a_single_layer_is_found_without_a_sibling() -> None:
    assert layers_of(model(["embed!", "layers.7", "head!"])) == ["layers.7"]


def test_a_list_of_plain_linear_modules_makes_no_layers() -> None:
    linear = [
        call(f"x{i}", "aten.linear.default", f"x{i - 1}" if i else "h", "w", module=f"net.{i}")
        for i in range(4)
    ]
    values = [value("h", (2, 3), kind="input"), value("w", (3, 3), kind="parameter")]
    values += [value(f"x{i}") for i in range(4)]
    (block,) = find_blocks(graph(linear, values, output="x3"))
    assert (block.module, block.is_layer) == ("net", True)


def test_calls_of_one_module_in_a_row_are_a_block_each() -> None:
    shared = [path for _ in range(3) for path in ("layers.0.attention", "layers.0.output")]
    found = find_blocks(model(["embed!", *shared]))
    assert [(b.module, b.stop - b.start) for b in found] == [("embed", 1), *[("layers.0", 6)] * 3]
    assert len({b.kind for b in found[1:]}) == 1


def test_a_few_ops_between_two_layers_go_with_the_second() -> None:
    found = find_blocks(model(["layers.0", "between!", "layers.1", "head!"]))
    assert [(b.module, b.stop - b.start) for b in found] == [("layers.0", 3), ("layers.1", 4), ("head", 1)]


def test_the_module_of_the_surroundings_is_the_path_that_they_share() -> None:
    found = find_blocks(model(["net.embed.a!", "net.embed.b!", "net.layers.0", "net.layers.1"]))
    assert found[0].module == "net.embed"


def test_a_kind_ignores_names_and_sees_shapes_wiring_and_literals() -> None:
    base = model(["layers.0"])
    kind = fingerprint(base, 0, 3)
    renamed = replace(
        base, ops=tuple(replace(op, name=f"other_{op.name}", module="layers.9") for op in base.ops)
    )
    assert fingerprint(renamed, 0, 3) == kind
    assert fingerprint(model(["layers.0"], width=4), 0, 3) != kind
    swapped = replace(base.ops[2], args=tuple(reversed(base.ops[2].args)))
    assert fingerprint(replace(base, ops=(*base.ops[:2], swapped)), 0, 3) != kind
    scaled = replace(base.ops[2], kwargs=(("alpha", 2),))
    assert fingerprint(replace(base, ops=(*base.ops[:2], scaled)), 0, 3) != kind


def test_a_kind_is_the_same_in_every_session() -> None:
    assert fingerprint(model(["layers.0"]), 0, 3) == "9f044396d9f48281"


def test_parts_of_blocks_within_a_range_keep_their_kind_only_if_whole() -> None:
    whole = model([f"layers.{i}" for i in range(3)])
    blocks = find_blocks(whole)
    parts = within(whole, blocks, 1, 9)
    assert [(b.start, b.stop) for b in parts] == [(1, 3), (3, 6), (6, 9)]
    assert parts[0].kind != blocks[0].kind
    assert [b.kind for b in parts[1:]] == [b.kind for b in blocks[1:]]
