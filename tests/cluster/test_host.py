"""A device's share of its host: read, written, and refused where it cannot be."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shardstage.cluster import Cluster, HostShare, load, preset_names
from shardstage.errors import ClusterError


@pytest.mark.parametrize("name", sorted({*preset_names()} - {"cpu"}))
def test_a_preset_of_gpus_knows_its_hosts_and_keeps_them_in_its_file(name: str) -> None:
    cluster = load(name)
    host = cluster.device.host
    assert host is not None and "PCIe" in host.source and "0.8" in host.source
    assert host.link_bytes_per_s < cluster.device.bytes_per_s
    assert Cluster.from_toml(cluster.to_toml()) == cluster


def test_a_cpu_is_its_own_host() -> None:
    assert load("cpu").device.host is None


def test_a_share_of_nothing_is_refused() -> None:
    host = HostShare(link_bytes_per_s=1.0, memory_bytes_per_s=1.0, memory_bytes=1, source="made up")
    with pytest.raises(ClusterError, match="memory_bytes must be above zero, not 0") as caught:
        replace(host, memory_bytes=0)
    assert "[device.host]" in str(caught.value.hint)
