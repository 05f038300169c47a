"""Clusters of several classes of devices: their parts, what a group over them costs, their files."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.cluster.machines import curve, device, level, two_level

from shardstage.cluster import Cluster, CollectiveKind, LinearCost, join, load, save
from shardstage.errors import ClusterError

KINDS: tuple[CollectiveKind, ...] = (
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "all_to_all",
    "broadcast",
    "p2p",
)


def slow(num_devices: int = 8) -> Cluster:
    """Nodes of 4 (1 s a hop, 100 bytes/s) on a network of 10 s a hop and 10 bytes/s; 4 ranks measured."""
    return replace(two_level(num_devices, curve(group=4)), name="slow")


def fast(num_devices: int = 6) -> Cluster:
    """Nodes of 2 (0.5 s a hop, 400 bytes/s) on a network of 12 s a hop and 40 bytes/s."""
    return Cluster(
        name="fast",
        device=device(name="toy2", memory_bytes=3000),
        num_devices=num_devices,
        levels=(level("node", 2, 0.5, 400.0), level("network", 8, 12.0, 40.0)),
    )


def host(num_devices: int = 4) -> Cluster:
    """One host without a network."""
    return Cluster(
        name="host", device=device(), num_devices=num_devices, levels=(level("host", 4, 2.0, 5.0),)
    )


def test_a_sum_of_presets_has_their_devices_in_rank_order() -> None:
    cluster = load("a100-40:8+h100:4")
    assert (cluster.name, cluster.num_devices, cluster.is_mixed) == ("a100-40:8+h100:4", 12, True)
    assert [(part.name, part.num_devices, part.ranks) for part in cluster.parts] == [
        ("a100-40", 8, range(8)),
        ("h100", 4, range(8, 12)),
    ]
    assert [cluster.part(0), cluster.part(1)] == [load("a100-40:8"), load("h100:4")]
    assert cluster.device == cluster.device_at(7) == load("a100-40").device
    assert cluster.device_at(8) == load("h100").device
    assert [cluster.part_of(rank) for rank in (0, 7, 8, 11)] == [0, 0, 1, 1]
    assert load("h100 + b200").num_devices == 16


def test_a_cluster_of_one_class_is_its_only_part() -> None:
    cluster = load("h100:24")
    assert not cluster.is_mixed
    assert cluster.part(0) is cluster
    assert [(part.device, part.ranks) for part in cluster.parts] == [(cluster.device, range(24))]
    assert cluster.device_at(23) == cluster.device


@given(kind=st.sampled_from(KINDS), ranks=st.sets(st.integers(0, 5), min_size=1).map(sorted))
def test_a_group_within_a_part_costs_what_it_costs_in_that_part_alone(
    kind: CollectiveKind, ranks: list[int]
) -> None:
    cluster = join([slow(8), fast(6)])
    assert cluster.collective(kind, ranks) == slow().collective(kind, ranks)
    shifted = [rank + 8 for rank in ranks]
    assert cluster.collective(kind, shifted) == fast().collective(kind, ranks)


def test_between_parts_the_network_has_the_lower_bandwidth_and_the_higher_latency() -> None:
    cluster = join([slow(8), fast(6)])
    network = cluster.levels[-1]
    assert (network.name, network.size) == ("network", 5)  # 2 nodes of 4 and 3 of 2
    assert (network.latency_s, network.bytes_per_s) == (12.0, 10.0)
    assert cluster.collective("p2p", [7, 8]) == LinearCost(12.0, 10.0)
    assert cluster.collective("p2p", [0, 4]) == LinearCost(10.0, 10.0)
    assert cluster.notes == (
        "between parts: the slowest of their networks, 1e-08 GB/s and 1.2e+07 µs; nothing was measured there",
    )


def test_unlike_gpus_of_one_box_are_told_how_to_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two old GPUs of a workstation were planned as two machines on a quarter of an Ethernet adapter."""
    monkeypatch.chdir(tmp_path)
    cluster = load("rtx-3090:1+v100-16:1")
    (note,) = (note for note in cluster.notes if "share a box" in note)
    code = re.search(r'python -c "(.*)" writes', note)
    assert code is not None
    exec(code[1])
    box = tmp_path / "box.toml"
    head, network, rest = box.read_text(encoding="utf-8").partition("[network]\n")
    rest = re.sub("bytes_per_s = .*", "bytes_per_s = 1e10", rest, count=1)
    box.write_text(head + network + rest, encoding="utf-8")
    edited = load(box)
    assert (
        edited.collective("p2p", [0, 1]).bytes_per_s == 1e10 > cluster.collective("p2p", [0, 1]).bytes_per_s
    )
    for larger in ("a100-40:8+h100:8", "rtx-3090:4+v100-16:1", "rtx-3090:1+v100-16:4"):
        assert not any("share a box" in each for each in load(larger).notes)


def test_a_group_over_parts_pays_the_worst_node_and_then_the_network() -> None:
    # Ranks 4..9: 4 in a slow node (2 hops of 1 s), 2 in a fast one; 2 nodes, 2 lanes at least: 2 × 5/6 of the tensor.
    cost = join([slow(8), fast(6)]).collective("all_reduce", range(4, 10))
    assert cost == pytest.approx(LinearCost(2 * (2 * 1.0 + 12.0), 10 * 2 / (2 * 5 / 6)))
    # One rank in every node: 5 nodes, 3 hops, 1 lane.
    every_node = join([slow(8), fast(6)]).collective("all_gather", [0, 4, 8, 10, 12])
    assert every_node == pytest.approx(LinearCost(3 * 12.0, 10 / 0.8))


def test_a_node_is_never_shared_by_two_parts() -> None:
    # 3 of the first node's 4 devices are used: rank 3 begins the next part, on a node of its own.
    cluster = join([slow(3), slow(4)], name="odd")
    assert cluster.level_for([2, 3]).name == "network"
    assert cluster.level_for([3, 6]).name == "node"


@given(
    kind=st.sampled_from(KINDS),
    ranks=st.sets(st.integers(0, 15), min_size=1).map(sorted),
    num_first=st.sampled_from([4, 8, 12]),
)
def test_parts_of_one_class_cost_what_the_whole_does(
    kind: CollectiveKind, ranks: list[int], num_first: int
) -> None:
    halves = join([two_level(num_first), two_level(16 - num_first)])
    whole = two_level(16)
    assert halves.collective(kind, ranks) == whole.collective(kind, ranks)
    assert halves.level_for(ranks).name == whole.level_for(ranks).name


def test_the_levels_to_speak_of_are_the_worst_by_position() -> None:
    cluster = join([slow(8), fast(6)])
    node, network = cluster.levels
    assert (node.name, node.size, node.latency_s, node.bytes_per_s) == ("node", 2, 1.0, 100.0)
    assert cluster.level_for([8, 9]) == cluster.level_for(4) == node
    assert cluster.level_for([8, 10]) == cluster.level_for([7, 8]) == network
    assert [cluster.devices_per(node), cluster.devices_per(network), cluster.capacity] == [2, 14, 14]


def test_a_host_without_a_network_is_joined_as_a_whole() -> None:
    cluster = join([host(4), slow(8)])
    assert [each.name for each in cluster.levels] == ["host/node", "network"]
    assert cluster.levels[-1].size == 3
    assert cluster.levels[-1].bytes_per_s == 5.0  # what leaves the host is not faster than the host
    assert cluster.collective("all_gather", range(4)) == host().collective("all_gather", 4)
    assert cluster.level_for([0, 3]) == cluster.levels[0]
    assert cluster.level_for([3, 4]) == cluster.levels[1]


def test_trees_of_different_depth_are_joined_above_their_nodes() -> None:
    deep = replace(
        fast(8), levels=(fast().levels[0], level("rack", 2, 3.0, 90.0), level("network", 4, 12.0, 40.0))
    )
    cluster = join([slow(8), deep])
    assert [each.name for each in cluster.levels] == ["node", "rack", "network"]
    assert cluster.collective("p2p", [8, 10]) == LinearCost(3.0, 90.0)
    over_both = cluster.collective("all_gather", [0, 8, 10])
    assert over_both == pytest.approx(LinearCost(3.0 + 12.0, 10 / (2 / 3)))


def test_a_mixed_cluster_survives_its_file(tmp_path: Path) -> None:
    cluster = join([replace(slow(8), notes=("made up",)), fast(6), host(2)], name="of three")
    assert Cluster.from_toml(cluster.to_toml()) == cluster
    save(cluster, tmp_path / "mixed.toml")
    assert load(tmp_path / "mixed.toml") == load(f"{tmp_path / 'mixed.toml'}:16") == cluster
    preset = load("a100-40:8+h100:8")
    assert Cluster.from_toml(preset.to_toml()) == preset
    assert len({preset, load(preset.name)}) == 1


def test_files_and_presets_are_joined_alike(tmp_path: Path) -> None:
    folder = tmp_path / "a+b"  # a plus in a file's own name is not a sum
    folder.mkdir()
    save(slow(8), folder / "slow.toml")
    assert load(f"{folder / 'slow.toml'}:5") == slow(5)
    save(slow(8), tmp_path / "slow.toml")
    cluster = load(f"{tmp_path / 'slow.toml'}:6+h100:16")
    assert [(part.name, part.num_devices) for part in cluster.parts] == [("slow", 6), ("h100", 16)]


def test_a_measured_network_between_parts_replaces_the_assumed_one() -> None:
    cluster = join([slow(8), fast(6)])
    measured = replace(cluster, levels=(*cluster.levels[:-1], level("wan", 5, 100.0, 1.0)))
    assert measured.collective("p2p", [7, 8]) == LinearCost(100.0, 1.0)
    assert measured.collective("p2p", [0, 4]) == LinearCost(10.0, 10.0)
    assert Cluster.from_toml(measured.to_toml()) == measured


def test_what_all_devices_cost_an_hour_is_known_where_every_price_is() -> None:
    prices = [load(name).device.price_per_hour or 0.0 for name in ("a100-40", "h100")]
    assert load("a100-40:8+h100:4").price_per_hour == pytest.approx(8 * prices[0] + 4 * prices[1])
    assert load("h100:100").price_per_hour == pytest.approx(100 * prices[1])
    assert load("h100:8+cpu:2").price_per_hour is None


@pytest.mark.parametrize(
    ("spec", "message", "hint"),
    [
        ("a100-40:8+h1000:8", "'h1000' is neither a preset nor a cluster file", "h100"),
        ("a100-40:8+h100:0", "the part 'h100:0' of 'a100-40:8.h100:0' has no devices", "a100-40:8"),
        ("a100-40:8+", r"a part of 'a100-40:8\+' has no name", "a100-40:8+h100:8"),
        ("cpu:2+cpu:2", r"none of the parts of 'cpu:2\+cpu:2' has a network to join them over", "[[level]]"),
    ],
)
def test_a_sum_that_cannot_be_is_refused_with_the_reason(spec: str, message: str, hint: str) -> None:
    with pytest.raises(ClusterError, match=message) as caught:
        load(spec)
    assert hint in str(caught.value.hint)


def test_the_number_of_devices_of_a_mixed_cluster_is_said_part_by_part() -> None:
    cluster = load("a100-40:8+h100:8")
    assert cluster.with_devices(16) == cluster
    with pytest.raises(ClusterError, match="12 of them could be taken from any part") as caught:
        cluster.with_devices(12)
    assert caught.value.hint == "say how many of each part: --cluster a100-40:8+h100:8"


def test_parts_ranks_and_joins_that_cannot_be_are_refused() -> None:
    cluster = join([slow(8), fast(6)])
    with pytest.raises(ClusterError, match="has no part 2: it has 2"):
        cluster.part(2)
    with pytest.raises(ClusterError, match="has no rank 14") as caught:
        cluster.device_at(14)
    assert caught.value.hint == "ranks 0 to 13"
    with pytest.raises(ClusterError, match=r"\[13, 14\] is no group of distinct ranks of the 14"):
        cluster.collective("p2p", [13, 14])
    with pytest.raises(ClusterError, match="joins a cluster that has several parts itself"):
        join([cluster, slow(8)])
    with pytest.raises(ClusterError, match="joins 1 parts; it takes at least 2"):
        join([slow(8)])
    with pytest.raises(ClusterError, match="are those of its parts and cannot differ") as caught:
        replace(cluster, device=device(name="other"))
    assert "Cluster.of_parts" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[network]", "[netwrok]", "cluster: network is missing"),
        ('name = "fast"', "", r"cluster \[\[part\]\] 2: name is missing"),
        ("num_devices = 6", "num_devices = 0", "cluster 'fast' has no devices"),
        ('name = "toy2"', 'name = ""', r"\[\[part\]\] 2 \[device\]: name must be text"),
        ("notes = [", "notes = [3, ", "cluster: notes must be a list of texts"),
        ("version = 1", "version = 1\ncollective = []", "cluster: unknown key 'collective'"),
    ],
)
def test_a_wrong_mixed_file_is_refused_with_the_place_and_the_reason(
    old: str, new: str, message: str
) -> None:
    text = join([slow(8), fast(6)]).to_toml()
    assert old in text
    with pytest.raises(ClusterError, match=message) as caught:
        Cluster.from_toml(text.replace(old, new, 1))
    assert caught.value.hint
