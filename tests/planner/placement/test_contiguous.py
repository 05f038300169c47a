"""Contiguous placements: against all placements tried one by one, at the limits, and where ideals explode."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from shardstage.errors import PlanError
from shardstage.planner.placement import (
    PlacementGraph,
    Tensor,
    device_memory_bytes,
    lower_bound,
    place_contiguous,
    place_in_order,
    stage_time_s,
)

MakeGraph = Callable[[np.random.Generator, int], PlacementGraph]


def chain(*compute_s: float, transfer_s: float = 0.0) -> PlacementGraph:
    links = [Tensor(producer=i, consumers=(i + 1,), transfer_s=transfer_s) for i in range(len(compute_s) - 1)]
    return PlacementGraph(compute_s=compute_s, tensors=tuple(links))


def test_a_chain_is_cut_where_the_larger_half_is_smallest() -> None:
    found = place_contiguous(chain(3.0, 1.0, 2.0, 2.0), 2)
    assert found.device_of == (0, 0, 1, 1)
    assert found.stage_time_s == found.lower_bound_s == 4.0
    assert found.gap_ratio == 0.0
    assert found.method.startswith("exact over")


def test_a_cut_tensor_is_paid_by_sender_and_receiver() -> None:
    assert place_contiguous(chain(4.0, 4.0, transfer_s=1.0), 2).stage_time_s == 5.0
    assert place_contiguous(chain(4.0, 4.0, transfer_s=5.0), 2).stage_time_s == 8.0  # cutting would make it 9


@pytest.mark.parametrize("seed", range(150))
def test_any_small_graph_is_placed_as_well_as_by_trying_all(
    seed: int, make_graph: MakeGraph, slow: Callable[..., float]
) -> None:
    rng = np.random.default_rng(seed)
    num_devices, num_hosts = (3, 0) if seed % 2 else (2, 1)
    graph = make_graph(rng, int(rng.integers(2, 7)))
    if not all(graph.on_accelerator):
        num_devices, num_hosts = 2, 1
    limit_bytes = math.inf if seed % 3 else float(max(4.0, 0.6 * sum(graph.memory_bytes)))
    expected_s = slow(graph, num_devices, num_hosts=num_hosts, limit_bytes=limit_bytes, contiguous=True)
    if expected_s == math.inf:
        with pytest.raises(PlanError, match="no contiguous placement"):
            place_contiguous(graph, num_devices, num_hosts=num_hosts, memory_limit_bytes=limit_bytes)
        return
    found = place_contiguous(graph, num_devices, num_hosts=num_hosts, memory_limit_bytes=limit_bytes)
    assert found.stage_time_s == pytest.approx(expected_s)
    assert found.stage_time_s == stage_time_s(
        graph, found.device_of, num_devices=num_devices, num_hosts=num_hosts
    )
    held = device_memory_bytes(graph, found.device_of, num_devices=num_devices, num_hosts=num_hosts)
    assert max(held[:num_devices]) <= limit_bytes
    bound_s = lower_bound(graph, num_devices, num_hosts=num_hosts, memory_limit_bytes=limit_bytes)
    assert bound_s <= expected_s * (1 + 1e-9)


def test_where_ideals_explode_linear_orders_are_used_and_named() -> None:
    wide = PlacementGraph(
        compute_s=(0.0,) + (1.0,) * 20 + (0.0,),
        tensors=(
            Tensor(producer=0, consumers=tuple(range(1, 21)), transfer_s=0.01),
            *(Tensor(producer=i, consumers=(21,), transfer_s=0.01) for i in range(1, 21)),
        ),
    )
    found = place_contiguous(wide, 4, max_ideals=500)
    assert "linear orders" in found.method and "500" in found.method
    assert 5.0 <= found.lower_bound_s <= found.stage_time_s < 5.3


def test_more_devices_never_make_it_slower(make_graph: MakeGraph) -> None:
    graph = make_graph(np.random.default_rng(11), 14)
    times = [place_contiguous(graph, k, num_hosts=1).stage_time_s for k in range(1, 6)]
    assert times == sorted(times, reverse=True)


def test_colocated_nodes_with_a_cycle_between_them_share_a_device() -> None:
    graph = PlacementGraph(
        compute_s=(1.0, 1.0, 1.0),
        tensors=(
            Tensor(producer=0, consumers=(1,), transfer_s=0.0),
            Tensor(producer=1, consumers=(2,), transfer_s=0.0),
        ),
        colocation=(7, None, 7),
    )
    assert place_contiguous(graph, 3).stage_time_s == 3.0


def test_backward_nodes_go_where_their_forward_nodes_are() -> None:
    graph = PlacementGraph(
        compute_s=(1.0, 1.0, 2.0, 2.0),
        tensors=(
            Tensor(producer=0, consumers=(1,), transfer_s=0.1),
            Tensor(producer=1, consumers=(2,), transfer_s=0.1),
            Tensor(producer=2, consumers=(3,), transfer_s=0.1),
        ),
        colocation=(0, 1, 1, 0),
        is_backward=(False, False, True, True),
    )
    found = place_contiguous(graph, 2)
    assert found.device_of == (0, 1, 1, 0)
    assert found.stage_time_s == pytest.approx(3.2)


def test_memory_that_does_not_fit_is_refused_with_a_hint() -> None:
    graph = PlacementGraph(compute_s=(1.0, 1.0), tensors=(), memory_bytes=(5.0, 5.0))
    with pytest.raises(PlanError, match=r"holds 10 bytes\nhint: num_devices = 2"):
        place_contiguous(graph, 1, memory_limit_bytes=6.0)
    assert place_contiguous(graph, 2, memory_limit_bytes=6.0).stage_time_s == 1.0


def test_a_node_for_the_host_needs_a_host() -> None:
    graph = PlacementGraph(compute_s=(1.0,), tensors=(), on_accelerator=(False,), host_compute_s=(3.0,))
    with pytest.raises(PlanError, match="only on a host"):
        place_contiguous(graph, 2)
    assert place_contiguous(graph, 2, num_hosts=1).device_of == (2,)


@pytest.mark.parametrize("seed", range(24))
def test_what_is_not_exact_is_no_slower_than_the_line_of_the_nodes_in_order(
    seed: int, make_graph: MakeGraph
) -> None:
    """T5's operators on four devices were: none of the orders tried was that in which it was captured."""
    graph = replace(make_graph(np.random.default_rng(3000 + seed), 12), on_accelerator=())
    line = place_in_order(graph, 3)
    found = place_contiguous(graph, 3, max_ideals=0, num_orders=1)
    assert found.stage_time_s <= line.stage_time_s
