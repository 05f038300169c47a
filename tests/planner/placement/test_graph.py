"""The objective on a drawn example, what is refused, and what the preparation of a graph keeps."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from shardstage.errors import PlanError
from shardstage.planner.placement import PlacementGraph, Tensor, device_loads_s, stage_time_s
from shardstage.planner.placement.clusters import cluster
from shardstage.planner.placement.ideals import all_ideals, linear_orders, prefixes
from shardstage.planner.placement.limits import Limits
from shardstage.planner.placement.weld import weld

# 0 ──a──▶ 1     a is made on device 0 and used on 1 and 2
#   └─a──▶ 2     2 is used twice there, and received once
#   └─a──▶ 3
FORK = PlacementGraph(
    compute_s=(1.0, 10.0, 100.0, 1000.0),
    host_compute_s=(2.0, 20.0, 200.0, 2000.0),
    tensors=(Tensor(producer=0, consumers=(1, 2, 3), transfer_s=0.5),),
)
TWO_NODES = PlacementGraph(compute_s=(1.0, 1.0), tensors=())


def test_a_tensor_is_sent_once_and_received_once_per_device() -> None:
    assert device_loads_s(FORK, (0, 1, 2, 2), num_devices=3) == (1.5, 10.5, 1100.5)
    assert stage_time_s(FORK, (0, 1, 2, 2), num_devices=3) == 1100.5


def test_a_host_pays_no_communication() -> None:
    assert device_loads_s(FORK, (0, 1, 1, 1), num_devices=1, num_hosts=1) == (1.5, 2220.0)


def test_what_is_whole_on_one_device_costs_no_communication() -> None:
    assert device_loads_s(FORK, (0, 0, 0, 0), num_devices=2) == (1111.0, 0.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"compute_s": (1.0, -1.0)}, "compute_s of node 1 is -1.0"),
        ({"compute_s": (1.0, math.nan)}, "compute_s of node 1 is nan"),
        ({"memory_bytes": (1.0,)}, "memory_bytes has 1 entries for 2 nodes"),
        (
            {"tensors": (Tensor(producer=0, consumers=(2,), transfer_s=1.0),)},
            "names node 2, and there are 2 nodes",
        ),
        (
            {"tensors": (Tensor(producer=0, consumers=(1,), transfer_s=math.inf),)},
            "transfer_s of tensor 0 is inf",
        ),
        (
            {
                "tensors": (
                    Tensor(producer=0, consumers=(1,), transfer_s=1.0),
                    Tensor(producer=1, consumers=(0,), transfer_s=1.0),
                )
            },
            "node 0 needs its own result",
        ),
    ],
)
def test_a_wrong_graph_is_refused_with_a_hint(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message) as refused:
        replace(TWO_NODES, **arguments)
    assert refused.value.hint


def test_no_devices_are_refused() -> None:
    with pytest.raises(PlanError, match="0 devices"):
        Limits(num_devices=0, num_hosts=0, memory_limit_bytes=math.inf)


def test_a_costless_leaf_joins_its_only_neighbour() -> None:
    graph = PlacementGraph(
        compute_s=(0.0, 1.0, 1.0),
        tensors=(
            Tensor(producer=0, consumers=(1,), transfer_s=9.0),
            Tensor(producer=1, consumers=(2,), transfer_s=1.0),
        ),
        memory_bytes=(5.0, 0.0, 0.0),
    )
    assert len(cluster(graph, is_memory_tight=False, is_ordered=True)) == 2
    assert (
        len(cluster(graph, is_memory_tight=True, is_ordered=True)) == 3
    )  # its bytes may have to be elsewhere


def test_there_are_as_many_ideals_as_antichains() -> None:
    unrelated = cluster(
        PlacementGraph(compute_s=(1.0,) * 8, tensors=()), is_memory_tight=False, is_ordered=True
    )
    assert len(all_ideals(unrelated, at_most=256) or ()) == 256
    assert all_ideals(unrelated, at_most=255) is None
    links = tuple(Tensor(producer=i, consumers=(i + 1,), transfer_s=1.0) for i in range(7))
    in_line = cluster(
        PlacementGraph(compute_s=(1.0,) * 8, tensors=links), is_memory_tight=False, is_ordered=True
    )
    assert all_ideals(in_line, at_most=9) == [2**i - 1 for i in range(9)]


def test_linear_orders_pass_only_through_ideals() -> None:
    fork = cluster(FORK, is_memory_tight=False, is_ordered=True)
    ideals = set(all_ideals(fork, at_most=100) or ())
    for order in linear_orders(fork, count=6, seed=0):
        assert set(prefixes(order)) <= ideals


def test_what_no_faster_placement_separates_is_welded() -> None:
    limits = Limits(num_devices=2, num_hosts=0, memory_limit_bytes=math.inf)
    links = (
        Tensor(producer=0, consumers=(1,), transfer_s=7.0),
        Tensor(producer=1, consumers=(2,), transfer_s=1.0),
    )
    clusters = limits.clusters(PlacementGraph(compute_s=(3.0, 3.0, 6.0), tensors=links), is_ordered=True)
    welded = weld(clusters, limits, below_s=9.0)
    assert welded is not None and welded[1].tolist() == [0, 0, 1]
    assert weld(clusters, limits, below_s=6.0) is None
