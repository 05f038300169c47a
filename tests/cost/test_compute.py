"""The price of an op: whichever of arithmetic and memory takes longer, and the launch."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.cost.machines import round_machine
from tests.cost.toy import toy_graph

from shardstage.cost.compute import op_time, optimizer_s
from shardstage.graph import ModelGraph, Op

DEVICE = round_machine().device
GRAPH = toy_graph(num_layers=1, width=8, hidden=32, vocab=64, microbatch=2, sequence=16)
TOKENS = 2 * 16


def op_named(name: str, graph: ModelGraph = GRAPH) -> Op:
    return next(op for op in graph.ops if op.name == name)


def test_a_small_product_takes_as_long_as_reading_its_operands() -> None:
    moved = 4 * (TOKENS * 8 + 32 * 8 + TOKENS * 32)
    assert op_time(GRAPH, op_named("up_0"), DEVICE).forward_s == pytest.approx(moved / 1e9)


def test_a_large_product_takes_its_flops_and_twice_that_backward() -> None:
    graph = toy_graph(num_layers=1, width=4096, hidden=16384, microbatch=16, sequence=1024)
    flops = 2 * 16 * 1024 * 4096 * 16384
    assert op_time(graph, op_named("up_0", graph), DEVICE) == pytest.approx(
        (flops / 1e12, 2 * flops / 1e12, flops / 1e12)
    )


def test_an_elementwise_op_reads_and_writes_and_backward_also_reads_what_it_kept() -> None:
    tensor_s = 4 * TOKENS * 32 / 1e9
    assert op_time(GRAPH, op_named("relu_0"), DEVICE) == pytest.approx((2 * tensor_s, 3 * tensor_s, 0.0))


@pytest.mark.parametrize("name", ["flat", "targets"])
def test_a_view_is_free(name: str) -> None:
    assert op_time(GRAPH, op_named(name), replace(DEVICE, op_latency_s=1.0)) == (0.0, 0.0, 0.0)


def test_every_kernel_is_launched() -> None:
    slow = replace(DEVICE, op_latency_s=1.0)
    linear, relu = op_time(GRAPH, op_named("up_0"), slow), op_time(GRAPH, op_named("relu_0"), slow)
    assert linear == pytest.approx((1.0, 2.0, 1.0), abs=1e-3)
    assert relu == pytest.approx((1.0, 1.0, 0.0), abs=1e-3)


def test_what_needs_no_gradient_has_no_backward() -> None:
    values = {name: replace(value, requires_grad=False) for name, value in GRAPH.values.items()}
    frozen = replace(GRAPH, values=values)
    assert op_time(frozen, op_named("up_0"), DEVICE).backward_s == 0.0


def test_the_optimizer_reads_and_writes_its_state() -> None:
    assert optimizer_s(1_000_000, 4, 0, DEVICE) == pytest.approx(9 * 4e6 / 1e9)
    assert optimizer_s(0, 4, 3, replace(DEVICE, op_latency_s=1.0)) == 3.0
