"""What a collective costs over the links that its group crosses."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.cluster.machines import curve, two_level

from shardstage.cluster import CollectiveKind, LinearCost, LinkLevel
from shardstage.cluster.table import Table
from shardstage.errors import ClusterError


def test_a_group_is_joined_by_the_innermost_level_that_holds_it() -> None:
    cluster = two_level()
    assert cluster.level_for(4).name == "node"
    assert cluster.level_for([4, 7]).name == "node"
    assert cluster.level_for(5).name == "network"
    assert cluster.level_for([3, 4]).name == "network"
    assert cluster.level_for([9]).name == "node"
    assert [cluster.devices_per(level) for level in cluster.levels] == [4, 16]


def test_a_group_of_one_costs_nothing() -> None:
    assert two_level().collective("all_reduce", [7]).seconds(1e9) == 0.0


def test_a_ring_within_a_node_moves_twice_all_but_its_own_part() -> None:
    # 4 ranks: 2 × 3/4 of the tensor at 100 bytes/s, and 2 rounds of log2(4) hops of 1 s.
    assert two_level().collective("all_reduce", 4) == pytest.approx(LinearCost(4.0, 100 / 1.5))
    assert two_level().collective("all_gather", 4) == pytest.approx(LinearCost(2.0, 100 / 0.75))
    assert two_level().collective("reduce_scatter", 4) == two_level().collective("all_gather", 4)


def test_ranks_of_one_node_share_the_way_out_each_with_its_own_link() -> None:
    # 8 ranks, 4 lanes out of each node: 2 × 7/8 of the tensor at 4 × 10 bytes/s.
    assert two_level().collective("all_reduce", 8) == pytest.approx(LinearCost(2 * (2 + 10), 40 / 1.75))
    # One rank in each of 4 nodes: one lane.
    assert two_level().collective("all_reduce", [0, 4, 8, 12]) == pytest.approx(LinearCost(40.0, 10 / 1.5))


def test_a_message_between_nodes_pays_one_hop_and_one_link() -> None:
    assert two_level().collective("p2p", [3, 4]) == pytest.approx(LinearCost(10.0, 10.0))
    assert two_level().collective("p2p", [0, 1]) == pytest.approx(LinearCost(1.0, 100.0))


def test_all_to_all_sends_over_the_own_link_what_leaves_the_node() -> None:
    # Of 8 parts, 4 leave the node: half the tensor at 10 bytes/s.
    assert two_level().collective("all_to_all", 8).bytes_per_s == pytest.approx(20.0)


def test_an_uneven_group_costs_what_its_worst_part_does() -> None:
    # Ranks 0..3 and 4: only one lane into the second node.
    assert two_level().collective("all_gather", 5).bytes_per_s == pytest.approx(10 / 0.8)


def test_a_measured_curve_counts_before_the_levels() -> None:
    cluster = two_level(16, curve(group=4))
    assert cluster.collective("all_reduce", 4) == (3.0, 40.0)
    assert cluster.collective("all_reduce", [8, 9, 10, 11]) == (3.0, 40.0)
    assert cluster.collective("all_gather", 4) == two_level().collective("all_gather", 4)


def test_a_measured_curve_serves_other_sizes_over_the_same_links() -> None:
    cluster = two_level(16, curve(group=4))
    # Two ranks: half the hops, and 1 instead of 1.5 of the tensor on the wire.
    assert cluster.collective("all_reduce", 2) == pytest.approx(LinearCost(1.5, 60.0))
    assert cluster.collective("all_reduce", [0, 4]) == two_level().collective("all_reduce", [0, 4])


def test_the_nearest_measured_size_serves() -> None:
    cluster = two_level(16, curve(group=2, latency_s=1.0), curve(group=4))
    assert cluster.collective("all_reduce", 3) == pytest.approx(LinearCost(3.0, 40 * 1.5 / (4 / 3)))


def test_a_curve_across_nodes_serves_only_groups_with_as_many_lanes() -> None:
    cluster = two_level(16, curve(group=8, latency_s=7.0, bytes_per_s=30.0))
    assert cluster.collective("all_reduce", 8) == (7.0, 30.0)
    assert cluster.collective("all_reduce", 16).bytes_per_s == pytest.approx(30 * 1.75 / 1.875)
    assert cluster.collective("all_reduce", 4) == two_level().collective("all_reduce", 4)
    assert cluster.collective("all_reduce", [0, 4]) == two_level().collective("all_reduce", [0, 4])


@given(
    kind=st.sampled_from(["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "p2p"]),
    ranks=st.sets(st.integers(0, 15), min_size=2).map(sorted),
    num_bytes=st.tuples(st.integers(0, 10**9), st.integers(0, 10**9)).map(sorted),
)
def test_every_collective_has_a_finite_cost_that_grows_with_its_bytes(
    kind: CollectiveKind, ranks: list[int], num_bytes: list[int]
) -> None:
    cost = two_level().collective(kind, ranks)
    assert cost.latency_s > 0
    assert math.isfinite(cost.bytes_per_s)
    assert cost.seconds(num_bytes[0]) <= cost.seconds(num_bytes[1])


@pytest.mark.parametrize("ranks", [[], [0, 0], [-1, 0], [15, 16], range(17)])
def test_a_group_that_the_cluster_does_not_have_is_refused(ranks: list[int]) -> None:
    with pytest.raises(ClusterError, match="is no group of distinct ranks of the 16 of 'toy'"):
        two_level().collective("all_reduce", ranks)


def test_an_unknown_collective_is_refused_with_the_known_ones() -> None:
    kind: Any = "gather"  # as a file may say
    with pytest.raises(ClusterError, match="unknown collective 'gather'") as caught:
        two_level().collective(kind, 4)
    assert "reduce_scatter" in str(caught.value.hint)


def test_a_level_or_curve_that_cannot_be_is_refused() -> None:
    with pytest.raises(ClusterError, match="level 'node' must join at least one part, not 0"):
        LinkLevel(name="node", size=0, latency_s=1.0, bytes_per_s=1.0, source="")
    with pytest.raises(ClusterError, match=r"bytes_per_s > 0, not 1\.0 and 0\.0"):
        LinkLevel(name="node", size=1, latency_s=1.0, bytes_per_s=0.0, source="")
    with pytest.raises(ClusterError, match="the all_reduce curve of 1 ranks needs group >= 2"):
        curve(group=1)


def test_a_ring_takes_a_step_for_each_rank_but_one() -> None:
    """Eight ranks on two nodes: six steps of 0.1 s within and one of 0.5 s between; launching costs a hop of the innermost level."""
    cluster = two_level(16)
    node, network = cluster.levels
    levels = (replace(node, step_s=0.1), replace(network, step_s=0.5))
    ring = replace(cluster, levels=levels)
    for kind in ("all_gather", "reduce_scatter", "broadcast"):
        assert ring.collective(kind, 8).latency_s == pytest.approx(node.latency_s + 6 * 0.1 + 0.5)
        assert ring.collective(kind, 4).latency_s == pytest.approx(node.latency_s + 3 * 0.1)
    assert ring.collective("all_gather", [0, 4, 8, 12]).latency_s == pytest.approx(
        network.latency_s + 3 * 0.5
    )
    assert ring.collective("all_reduce", 8) == cluster.collective("all_reduce", 8), "by trees"
    assert ring.collective("all_gather", 8).bytes_per_s == cluster.collective("all_gather", 8).bytes_per_s
    with pytest.raises(ClusterError, match="must have step_s >= 0"):
        replace(node, step_s=-1.0)


def test_steps_that_a_level_does_not_know_leave_hops() -> None:
    cluster = two_level(16)
    half = replace(cluster, levels=(replace(cluster.levels[0], step_s=0.1), cluster.levels[1]))
    assert half.collective("all_gather", 8) == cluster.collective("all_gather", 8)
    assert half.collective("all_gather", 4).latency_s < cluster.collective("all_gather", 4).latency_s
    assert LinkLevel.from_table(Table(half.levels[0].to_table(), "level")) == half.levels[0]
