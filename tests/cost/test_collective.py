"""Which collectives an op of a local graph runs, and over how many bytes."""

from __future__ import annotations

from collections import Counter

import pytest
from tests.cost.toy import toy_graph

from shardstage.cost.collective import Call, calls_of, is_communication
from shardstage.graph import ModelGraph, Op, Ref, Value
from shardstage.sharding import localize, shard


def graph_of(target: str, *, requires_grad: bool = True) -> ModelGraph:
    """One op from 4 to 8 floats."""
    x = Value(name="x", shape=(4,), dtype="float32", kind="input", requires_grad=requires_grad)
    y = Value(name="y", shape=(8,), dtype="float32", kind="activation", requires_grad=requires_grad)
    op = Op(name="y", target=target, args=(Ref("x"),), outputs=("y",))
    return ModelGraph(ops=(op,), values={"x": x, "y": y}, inputs=("x",), parameters=())


@pytest.mark.parametrize(
    ("target", "calls"),
    [
        ("sum_gradient", [Call("all_reduce", 16, True)]),
        ("all_reduce", [Call("all_reduce", 16, False)]),
        ("all_gather", [Call("all_gather", 32, False), Call("reduce_scatter", 32, True)]),
        ("gather_whole", [Call("all_gather", 32, False)]),
        ("reduce_scatter", [Call("reduce_scatter", 16, False), Call("all_gather", 16, True)]),
        ("slice", [Call("all_gather", 16, True)]),
        ("narrow", []),
        ("dropout", []),
    ],
)
def test_each_operator_talks_forward_and_backward(target: str, calls: list[Call]) -> None:
    graph = graph_of(f"shardstage.{target}")
    assert list(calls_of(graph, graph.ops[0])) == calls
    assert is_communication(graph.ops[0]) == (target != "dropout")


def test_without_a_gradient_nothing_is_said_backward() -> None:
    graph = graph_of("shardstage.all_gather", requires_grad=False)
    assert list(calls_of(graph, graph.ops[0])) == [Call("all_gather", 32, False)]


def test_a_layer_sums_once_forward_and_once_backward() -> None:
    graph = toy_graph(num_layers=3, microbatch=2, sequence=16)
    local = localize(shard(graph, num_ranks=2), 0)
    of_layers = [op for op in local.ops if op.module.startswith("layers.1")]
    counts = Counter((c.kind, c.is_backward, c.num_bytes) for op in of_layers for c in calls_of(local, op))
    activation_bytes = 4 * 2 * 16 * 8
    assert counts == {("all_reduce", False, activation_bytes): 1, ("all_reduce", True, activation_bytes): 1}


def test_a_loss_over_a_cut_vocabulary_sums_three_numbers_a_target() -> None:
    graph = toy_graph(num_layers=1, microbatch=2, sequence=16)
    local = localize(shard(graph, num_ranks=2), 0)
    loss = next(op for op in local.ops if op.name == "loss")
    assert loss.target == "shardstage.cross_entropy"
    row = 4 * 2 * 16
    assert list(calls_of(local, loss)) == [Call("all_reduce", row, False), Call("all_reduce", 2 * row, False)]


def test_every_operator_of_sharding_has_a_price() -> None:
    """An inserted op that this package does not know would be priced as compute."""
    for sp in (False, True):
        graph = toy_graph(num_layers=2, microbatch=2, sequence=16)
        local = localize(shard(graph, num_ranks=2, is_sequence_parallel=sp), 0)
        inserted = [op for op in local.ops if "@" in op.name and op.target.startswith("shardstage.")]
        assert inserted and all(is_communication(op) for op in inserted)
