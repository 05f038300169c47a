"""Captured models as graphs to place: the figures are the cost model's, and what belongs together stays so."""

from __future__ import annotations

import pytest
from tests.cost.machines import round_machine
from tests.cost.toy import toy_graph
from tests.planner.placement.captured import WIDTH, NormedTwice, Tables, UsesTwice, captured

from shardstage.cluster import Cluster, load
from shardstage.cost import Links, StepSetup, fold, profile, stage_memory
from shardstage.graph import ModelGraph
from shardstage.layout import Mesh
from shardstage.planner.placement import OpGraph, place, placement_graph

MACHINE = round_machine(8, latency_s=1e-6)


def node_of(graph: ModelGraph, found: OpGraph, op: str) -> int:
    index = next(index for index, each in enumerate(graph.ops) if each.name == op)
    return next(node for node, ops in enumerate(found.ops_of_node) if index in ops)


@pytest.mark.parametrize("cluster", [MACHINE, load("h100:8"), load("cpu:4")], ids=lambda c: c.name)
def test_nodes_together_take_what_the_profile_says(cluster: Cluster) -> None:
    """On a GPU the host races its device block by block: priced op by op alone, a layer would take longer."""
    graph = toy_graph(num_layers=6, width=64, hidden=256, vocab=512)
    units = profile(fold(graph), cluster, tp=1, microbatch=2, sequence=64).units
    found = placement_graph(graph, cluster, microbatch=2, sequence=64).placement
    assert sum(found.compute_s) == pytest.approx(sum(u.forward_s + u.backward_s for u in units), rel=1e-12)


@pytest.mark.parametrize("is_tied", [False, True])
def test_nodes_together_hold_what_one_stage_of_zero_0_holds(is_tied: bool) -> None:
    """A tied embedding counts twice, as its two ops may lie apart."""
    graph = toy_graph(num_layers=6, width=64, vocab=512, is_tied=is_tied)
    found = profile(fold(graph), MACHINE, tp=1, microbatch=2, sequence=64)
    setup = StepSetup(
        mesh=Mesh(),
        starts=(0,),
        microbatch=2,
        num_microbatches=3,
        global_batch=6,
        sequence=64,
        zero=0,
        recompute="none",
        schedule="gpipe",
        precision="float32",
        bucket_bytes=1,
    )
    use = stage_memory(found, setup, 0)
    expected = use.parameters + use.gradients + use.optimizer + use.activations
    copy = 4 * 4 * 512 * 64 if is_tied else 0
    placed = placement_graph(graph, MACHINE, microbatch=2, sequence=64, in_flight=3).placement
    assert sum(placed.memory_bytes) == pytest.approx(expected + copy, rel=1e-9)
    assert len(set(placed.colocation)) == placed.num_nodes


def test_a_value_travels_to_the_neighbour_and_its_gradient_back() -> None:
    graph = toy_graph(num_layers=2, width=64)
    found = placement_graph(graph, MACHINE, microbatch=2, sequence=64)
    down = next(op for op in graph.ops if op.name.startswith("add"))
    maker = node_of(graph, found, down.name)
    tensor = next(each for each in found.placement.tensors if each.producer == maker)
    num_bytes = 2 * 64 * 64 * 4
    assert tensor.transfer_s == pytest.approx(2 * Links(MACHINE, Mesh(pp=2)).transfer_s(num_bytes))


def test_tables_and_views_are_made_where_they_are_read() -> None:
    """A table travels to no device; views of one size are the value that they view, and parts of it travel by themselves."""
    graph = captured(Tables())
    found = placement_graph(graph, MACHINE, microbatch=8, sequence=None)
    target_of = {op.name: op.target.split(".")[1] for op in graph.ops}
    added = [name for name, target in target_of.items() if target == "add"]
    for name, target in target_of.items():
        if target in ("arange", "sin"):
            assert node_of(graph, found, name) == node_of(graph, found, added[0]), name
        if target in ("view", "transpose", "unbind"):
            assert node_of(graph, found, name) == node_of(graph, found, added[0]), name
    concatenated = node_of(graph, found, next(name for name, t in target_of.items() if t == "cat"))
    halves = [t for t in found.placement.tensors if concatenated in t.consumers]
    half_s = 2 * Links(MACHINE, Mesh(pp=2)).transfer_s(8 * 128 * 4)
    assert [t.transfer_s for t in halves] == pytest.approx([half_s, half_s])
    second = node_of(graph, found, added[1])
    assert len([t for t in found.placement.tensors if second in t.consumers]) == 1, "no table"


def test_all_that_touch_a_buffer_that_is_changed_share_a_device() -> None:
    graph = captured(NormedTwice())
    found = placement_graph(graph, MACHINE, microbatch=8, sequence=None)
    norms = [op.name for op in graph.ops if op.target.startswith("aten.batch_norm.")]
    layer = next(op.name for op in graph.ops if op.target.startswith("aten.linear."))
    first, second, between = (node_of(graph, found, name) for name in (*norms, layer))
    assert first != second
    colours = found.placement.colocation
    assert colours[first] == colours[second] != colours[between]
    free = place(found.placement, 2, max_moves=2000).device_of
    assert free[first] == free[second]


def test_ops_of_one_block_that_share_a_parameter_share_a_device_and_hold_it_once() -> None:
    graph = captured(UsesTwice())
    found = placement_graph(graph, MACHINE, microbatch=8, sequence=None, in_flight=0)
    assert sum(found.placement.memory_bytes) == 3 * 4 * 4 * WIDTH * WIDTH
    colours = found.placement.colocation
    users = [
        [node_of(graph, found, graph.ops[index].name) for index in graph.consumers[parameter.name]]
        for parameter in graph.parameters
    ]
    assert all(first != second and colours[first] == colours[second] for first, second in users)
    assert len({colours[first] for first, _ in users}) == 3
