"""How groups lie over a tree: arithmetic on ranges against counting rank by rank."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.cluster.machines import curve, device, level, two_level

from shardstage.cluster import Cluster, CollectiveKind, LinearCost, load
from shardstage.cluster.groups import Spread, cut, most_parts, rising, spread
from shardstage.errors import ClusterError

RANGES = st.builds(
    lambda start, stride, count: range(start, start + stride * count, stride),
    st.integers(0, 60),
    st.integers(1, 25),
    st.integers(1, 40),
)


def test_the_drawing_of_the_module_is_true() -> None:
    assert spread(range(0, 13, 3), 4) == Spread(units=4, fewest=1, most=2)


@given(group=RANGES, unit=st.integers(1, 30), size=st.integers(1, 6))
@settings(max_examples=400)
def test_a_range_lies_over_units_as_its_ranks_do_one_by_one(group: range, unit: int, size: int) -> None:
    assert spread(group, unit) == spread(list(group), unit)
    assert most_parts(group, unit, size) == most_parts(list(group), unit, size)


@given(group=RANGES, first=st.integers(0, 200), count=st.integers(1, 200))
@settings(max_examples=400)
def test_a_range_is_cut_as_its_ranks_are(group: range, first: int, count: int) -> None:
    assert list(cut(group, first, count)) == cut(list(group), first, count)


def test_a_range_that_falls_is_turned_round() -> None:
    assert rising(range(6, -1, -2)) == range(0, 8, 2)
    assert two_level().collective("all_reduce", range(7, -1, -1)) == two_level().collective("all_reduce", 8)


def ragged() -> Cluster:
    """Three levels of odd sizes, with measured curves at two of them."""
    return Cluster(
        name="ragged",
        device=device(),
        num_devices=200,
        levels=(level("node", 3, 1.0, 100.0), level("rack", 5, 4.0, 30.0), level("hall", 14, 9.0, 7.0)),
        collectives=(curve(group=3), curve(group=15, latency_s=9.0), curve(kind="all_gather", group=30)),
    )


def test_a_strided_group_costs_what_its_ranks_do_one_by_one() -> None:
    draw = random.Random(4)
    clusters = (ragged(), two_level(), load("h100:200"), load("a100-40:37+h100:20+a100-80:64"))
    kinds: tuple[CollectiveKind, ...] = (
        "all_reduce",
        "all_gather",
        "reduce_scatter",
        "all_to_all",
        "broadcast",
        "p2p",
    )
    for _ in range(1500):
        cluster, kind = draw.choice(clusters), draw.choice(kinds)
        stride, start = draw.randint(1, 40), draw.randrange(cluster.num_devices)
        count = draw.randint(1, (cluster.num_devices - 1 - start) // stride + 1)
        one_by_one = list(range(start, start + stride * count, stride))
        strided = cluster.collective_strided(kind, start=start, stride=stride, count=count)
        assert strided == cluster.collective(kind, one_by_one), (cluster.name, kind, one_by_one)
        assert cluster.level_for(range(start, start + stride * count, stride)) == cluster.level_for(
            one_by_one
        )


def test_a_strided_group_of_any_length_is_priced_without_counting_it() -> None:
    cluster = load("h100:1000000000")
    every_node = cluster.collective_strided("all_reduce", stride=8, count=125_000_000)
    node, network = cluster.levels
    assert every_node.latency_s == pytest.approx(2 * 27 * network.latency_s)
    assert every_node.bytes_per_s == pytest.approx(network.bytes_per_s / 2)
    # All ranks: eight lanes leave each node, and then the node is the slower of the two.
    assert cluster.collective("all_reduce", 10**9).bytes_per_s == pytest.approx(node.bytes_per_s / 2)


def test_a_strided_group_that_the_cluster_does_not_have_is_refused() -> None:
    cluster = two_level()
    assert cluster.collective_strided("p2p", start=9, stride=5, count=1) == LinearCost(0.0, float("inf"))
    with pytest.raises(ClusterError, match="a group's stride is at least 1, not 0"):
        cluster.collective_strided("p2p", stride=0, count=2)
    with pytest.raises(ClusterError, match=r"\[0, 8, 16\] is no group of distinct ranks of the 16") as caught:
        cluster.collective_strided("p2p", stride=8, count=3)
    assert caught.value.hint == "toy:17"
    with pytest.raises(ClusterError, match="is no group of distinct ranks"):
        cluster.collective_strided("p2p", stride=1, count=0)
    with pytest.raises(ClusterError, match="is no group of distinct ranks"):
        cluster.collective_strided("p2p", start=-1, stride=1, count=2)
