"""Folding: eighty equal layers are priced as two."""

from __future__ import annotations

import pytest
from tests.cost.toy import toy_graph

from shardstage.cost import Folded, by_op, fold
from shardstage.graph import ModelGraph
from shardstage.graph.flops import forward_flops


def twins(folded: Folded) -> list[int]:
    return [unit.twin for unit in folded.units]


def whole_flops(folded: Folded) -> int:
    ops = folded.graph.ops
    kept = [sum(forward_flops(folded.graph, op) for op in ops[a:b]) for a, b in folded.kept]
    return sum(kept[unit.twin] for unit in folded.units)


def unknown_names(graph: ModelGraph) -> set[str]:
    """Values that an op reads and nobody makes."""
    stored = {p.name for p in (*graph.parameters, *graph.buffers)} | {c.name for c in graph.constants}
    known = {*graph.inputs, *stored}
    missing = set()
    for op in graph.ops:
        missing |= set(op.inputs) - known
        known |= {name for name in op.outputs if name is not None}
    return missing


def test_equal_layers_are_kept_twice() -> None:
    folded = fold(toy_graph(num_layers=8))
    assert twins(folded) == [0, 1, 2, 2, 2, 2, 2, 2, 2, 3]
    assert [op.name for op in folded.graph.ops if op.name.startswith("up")] == ["up_0", "up_1"]


def test_two_layers_are_left_as_they_are() -> None:
    graph = toy_graph(num_layers=2)
    assert fold(graph).graph.ops == graph.ops


def test_layers_that_alternate_are_kept_as_two_pairs() -> None:
    graph = toy_graph(hidden=(32, 48) * 4)
    assert twins(fold(graph)) == [0, 1, 2, 3, 4, 3, 4, 3, 4, 5]


def test_a_layer_unlike_the_others_stays() -> None:
    graph = toy_graph(hidden=(32, 32, 32, 32, 48, 32, 32, 32))
    assert twins(fold(graph)) == [0, 1, 2, 2, 2, 3, 4, 5, 5, 6]


@pytest.mark.parametrize("hidden", [32, (32, 48) * 5, (16, 32, 48) * 4, (8, 16, 24, 32)])
@pytest.mark.parametrize("boundaries", [(), (3,), (3, 7, 11), tuple(range(1, 30))])
def test_folding_changes_neither_the_tiling_nor_the_total(
    hidden: int | tuple[int, ...], boundaries: tuple[int, ...]
) -> None:
    graph = toy_graph(num_layers=12, hidden=hidden)
    boundaries = tuple(b for b in boundaries if b < len(graph.ops))
    folded = fold(graph, boundaries=boundaries)
    assert [unit.stop for unit in folded.units[:-1]] == [unit.start for unit in folded.units[1:]]
    assert (folded.units[0].start, folded.units[-1].stop) == (0, len(graph.ops))
    assert set(boundaries) <= {unit.start for unit in folded.units}
    assert [b for _, b in folded.kept[:-1]] == [a for a, _ in folded.kept[1:]]
    assert whole_flops(folded) == sum(forward_flops(graph, op) for op in graph.ops)


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_folded_graph_is_a_graph(is_tied: bool) -> None:
    graph = fold(toy_graph(num_layers=9, is_tied=is_tied)).graph
    assert unknown_names(graph) == set()
    assert graph.output == "loss"
    assert {p.name for p in graph.parameters} == {
        name for name, value in graph.values.items() if value.kind == "parameter"
    }
    assert graph.at(microbatch=2, sequence=16).values["add_1"].shape == (2, 16, 8)


def test_layers_of_which_other_modules_are_named_are_told_apart() -> None:
    graph = toy_graph(num_layers=8)
    assert (
        twins(fold(graph, modules=("layers.*",)))
        == twins(fold(graph, modules=("*.up",)))
        == twins(fold(graph))
    )
    assert twins(fold(graph, modules=("layers.4",))) == [0, 1, 2, 2, 2, 3, 4, 5, 5, 6]
    folded = fold(graph, boundaries=(18,), modules=("layers.[46]",))
    kinds = [unit.kind for unit in folded.units]
    assert folded.modules == ("layers.[46]",) and kinds[5:8] != kinds[3:4] * 3


def test_a_unit_is_found_by_its_first_op() -> None:
    folded = fold(toy_graph(num_layers=3), boundaries=(7,))
    assert folded.units[folded.unit_at(7)].start == 7


def test_a_unit_for_every_op_stands_for_the_kept_op_at_its_place() -> None:
    """Layers 2 to 6 are read as the second one: their ops have as many FLOPs, by other names."""
    graph = toy_graph(num_layers=6)
    folded = by_op(fold(graph))
    assert [(unit.start, unit.stop) for unit in folded.units] == [(i, i + 1) for i in range(len(graph.ops))]
    assert len(folded.kept) == len(folded.graph.ops) < len(graph.ops)
    for unit in folded.units:
        kept, op = folded.graph.ops[folded.kept[unit.twin][0]], graph.ops[unit.start]
        assert kept.target == op.target
        assert forward_flops(folded.graph, kept) == forward_flops(graph, op)
