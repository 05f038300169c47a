"""Clusters as files: presets, round trips and what is refused."""

from __future__ import annotations

import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.cluster.machines import curve, device, gemm_curve, two_level

from shardstage.cluster import Cluster, LinearCost, load, preset_names, save
from shardstage.cluster.table import to_toml
from shardstage.errors import ClusterError


def full_cluster() -> Cluster:
    cluster = two_level(16, curve(), curve(kind="p2p", group=2))
    replaced = device(
        gemm=(gemm_curve((10.0, 20.0), (1000.0, 40.0)),),
        op_latency_s=1e-6,
        alone_ratio=1.5,
        message=LinearCost(1e-3, 2e9),
        name='a "quoted" name',
    )
    return Cluster(
        name=cluster.name,
        device=replaced,
        num_devices=16,
        levels=cluster.levels,
        collectives=cluster.collectives,
    )


def test_the_readme_names_the_presets() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    named = readme.partition("or a preset with a number of devices")[2].partition(". Each of")[0]
    assert set(re.findall(r"`([a-z0-9-]+)`", named)) == set(preset_names())


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_is_written_exactly_as_it_is_read(name: str) -> None:
    cluster = load(name)
    assert cluster.name == name
    assert Cluster.from_toml(cluster.to_toml()) == cluster


@pytest.mark.parametrize("name", preset_names())
def test_the_devices_of_a_preset_share_no_cores(name: str) -> None:
    device = load(name).device
    assert (device.alone_ratio, device.message) == (1.0, None)


@pytest.mark.parametrize("name", preset_names())
def test_every_number_of_a_preset_has_its_source(name: str) -> None:
    cluster = load(name)
    device = cluster.device
    sources = [device.source, device.flops_source]
    sources += [level.source for level in cluster.levels]
    sources += [curve.source for curve in cluster.collectives]
    sources += [curve.source for curve in device.gemm]
    assert all(len(source) > 10 for source in sources)


@pytest.mark.parametrize("name", sorted({*preset_names()} - {"cpu"}))
def test_a_gpu_preset_is_faster_within_a_node_than_across_nodes(name: str) -> None:
    cluster = load(name).with_devices(64)
    node = cluster.levels[0].size
    inside = cluster.collective("all_gather", node).bytes_per_s
    across = cluster.collective("all_gather", range(0, 64, node)).bytes_per_s
    has_nvlink = "NVLink 2" in cluster.levels[0].source or cluster.device.compute_capability is None
    assert inside > 5 * across if has_nvlink else inside >= across


@pytest.mark.parametrize("name", sorted({*preset_names()} - {"cpu"}))
def test_tensor_cores_are_faster_than_float32_without_them(name: str) -> None:
    """On GeForce they accumulate in float32 at half of what their datasheet says first; before Ampere they take no bfloat16."""
    device = load(name).device
    float32_s, float16_s, bfloat16_s = (
        device.gemm_s(2.0 * 4096**3, dtype=dtype) for dtype in ("float32", "float16", "bfloat16")
    )
    assert float32_s > 2 * float16_s
    assert (bfloat16_s == float16_s) == device.has_bfloat16
    assert bfloat16_s == float16_s or bfloat16_s > float32_s


@pytest.mark.parametrize(
    ("name", "capability"),
    [
        ("v100-16", 7.0),
        ("v100-32", 7.0),
        ("rtx-3090", 8.6),
        ("rtx-4090", 8.9),
        ("a10g", 8.6),
        ("l40s", 8.9),
        ("rtx-a6000", 8.6),
        ("h100", None),
    ],
)
def test_a_preset_keeps_its_compute_capability_where_it_has_one(name: str, capability: float | None) -> None:
    cluster = load(name)
    assert cluster.device.compute_capability == capability
    assert Cluster.from_toml(cluster.to_toml()) == cluster
    assert ("compute_capability" in cluster.to_toml()) == (capability is not None)


def test_a_measured_preset_repeats_its_measurement() -> None:
    # nccl-tests on 8 H100: 1 GiB in 4029.4 µs; the line through 1 MiB .. 2 GiB is within 15 % of it.
    assert load("h100").collective("all_reduce", 8).seconds(2**30) == pytest.approx(4029.4e-6, rel=0.15)


def test_a_cluster_with_everything_survives_its_file(tmp_path: Path) -> None:
    save(full_cluster(), tmp_path / "toy.toml")
    assert load(tmp_path / "toy.toml") == full_cluster()
    assert load(f"{tmp_path / 'toy.toml'}:3") == full_cluster().with_devices(3)
    assert (tmp_path / "toy.toml").read_text(encoding="utf-8") == full_cluster().to_toml()


def test_a_preset_is_cut_to_any_number_of_devices() -> None:
    assert load("h100:512").num_devices == 512
    assert load("h100:3").with_devices(512) == load("h100:512")


def test_a_preset_grows_with_the_devices_that_are_asked_of_it_and_says_so() -> None:
    cluster = load("h100:100000")
    assert cluster.num_devices == cluster.capacity == 100_000
    assert replace(cluster.levels[-1], size=3072) == load("h100").levels[-1]
    assert cluster.notes == (
        "h100: its network is sourced for 24576 devices and taken to join 100000 with the same latency and bandwidth",
    )
    assert Cluster.from_toml(cluster.to_toml()) == cluster
    assert load("h100:24576").notes == ()


def test_a_single_host_and_a_file_do_not_grow(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="cluster 'cpu' joins at most 64 devices, not 65"):
        load("cpu:65")
    save(full_cluster(), tmp_path / "toy.toml")
    with pytest.raises(ClusterError, match="cluster 'toy' joins at most 16 devices, not 17") as caught:
        load(f"{tmp_path / 'toy.toml'}:17")
    assert "raise `size` of the level 'network'" in str(caught.value.hint)


def test_equal_clusters_have_equal_hashes() -> None:
    assert len({load("h100"), load("h100"), load("h100:9")}) == 2


@given(st.floats(allow_nan=False, allow_infinity=False), st.text(st.characters(codec="utf-8")))
def test_any_number_and_text_survives_toml(number: float, text: str) -> None:
    assert tomllib.loads(to_toml({"number": number, "text": text})) == {"number": number, "text": text}


def test_numbers_are_written_as_people_write_them() -> None:
    values = {"rate": 3.35e12, "latency": 5e-6, "ratio": 0.5, "count": 8}
    assert to_toml(values) == "rate = 3.35e12\nlatency = 5e-6\nratio = 0.5\ncount = 8\n"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("num_devices = 16", "num_devices = 17", "cluster 'toy' joins at most 16 devices, not 17"),
        ("num_devices = 16", "num_devices = 0", "cluster 'toy' has no devices"),
        ("num_devices = 16", "num_devices = 1.5", "cluster: num_devices must be a whole number, not 1.5"),
        ("version = 1", "version = 2", "cluster: version 2 of the format is unknown"),
        ('name = "toy"', "", "cluster: name is missing"),
        ("memory_bytes = 1000", "memory_byte = 1000", r"cluster \[device\]: memory_bytes is missing"),
        ("num_devices = 16", "num_devices = 16\nnum_device = 3", "unknown key 'num_device'"),
        (
            "bytes_per_s = 100.0",
            'bytes_per_s = "fast"',
            r"\[device\]: bytes_per_s must be a number, not 'fast'",
        ),
        ("bfloat16 = 100.0", "bfloat16 = nan", r"\[flops_per_s\]: bfloat16 must be a number, not nan"),
        ('kind = "p2p"', 'kind = "gossip"', "unknown collective 'gossip'"),
        ('kind = "p2p"\ngroup = 2', 'kind = "all_reduce"\ngroup = 4', "has two all_reduce curves of 4 ranks"),
        ("points = [[10.0, 20.0], [1000.0, 40.0]]", "points = [10.0]", "points must be a list of pairs"),
        ("size = 4", "size = ", "cluster is not TOML"),
    ],
)
def test_a_wrong_file_is_refused_with_the_place_and_the_reason(old: str, new: str, message: str) -> None:
    text = full_cluster().to_toml()
    assert old in text
    with pytest.raises(ClusterError, match=message) as caught:
        Cluster.from_toml(text.replace(old, new, 1))
    assert caught.value.hint


def test_a_misspelt_key_is_answered_with_the_right_one() -> None:
    text = full_cluster().to_toml().replace("num_devices = 16", "num_devices = 16\nnum_device = 3")
    with pytest.raises(ClusterError) as caught:
        Cluster.from_toml(text)
    assert caught.value.hint == "num_devices = …"


def test_a_name_that_is_neither_preset_nor_file_lists_the_presets(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="'h1000' is neither a preset nor a cluster file") as caught:
        load("h1000:8")
    assert "h100" in str(caught.value.hint)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ClusterError, match="it is not UTF-8 text"):
        load(tmp_path / "binary.toml")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"cannot write the cluster file .*: No such file"):
        save(full_cluster(), tmp_path / "nowhere" / "toy.toml")


def test_a_cluster_without_links_is_refused() -> None:
    with pytest.raises(ClusterError, match="cluster 'bare' has no link level"):
        Cluster(name="bare", device=device(), num_devices=1, levels=())
