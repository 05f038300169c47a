"""The machine is looked at once, and again when it is another one."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardstage.cli import machine
from shardstage.cli.machine import cluster_named, known_cluster, num_default_ranks
from shardstage.cluster import Cluster, load, save
from shardstage.errors import ClusterError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("SHARDSTAGE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "shardstage"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of ranks that this machine was measured with; no measurement takes place."""
    calls: list[int] = []

    def measure(ranks: int, *, budget_s: float) -> Cluster:
        calls.append(ranks)
        return load(f"cpu:{ranks}")

    monkeypatch.setattr(machine, "probe_machine", measure)
    return calls


def test_this_machine_is_measured_once_for_each_number_of_ranks(cache: Path, measured: list[int]) -> None:
    assert known_cluster("local", ranks=2) is None
    first = cluster_named("local", ranks=2)
    assert cluster_named("local", ranks=2) == first == known_cluster("local", ranks=2)
    assert measured == [2]
    assert cluster_named("local", ranks=3).num_devices == 3
    assert measured == [2, 3]
    assert len(list(cache.iterdir())) == 2, "no half written file stays"


def test_it_is_kept_where_captures_are_or_not_at_all(
    tmp_path: Path, cache: Path, measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SHARDSTAGE_CACHE was for captures alone: a home without room, or one that is shared by unlike machines, was written all the same."""
    monkeypatch.setenv("SHARDSTAGE_CACHE", str(tmp_path / "mine"))
    cluster_named("local", ranks=2)
    assert [path.name.split("-")[0] for path in (tmp_path / "mine").iterdir()] == ["cluster"]
    monkeypatch.setenv("SHARDSTAGE_CACHE", "off")
    assert known_cluster("local", ranks=2) is None
    cluster_named("local", ranks=2)
    assert measured == [2, 2]
    assert not cache.exists()


def test_another_machine_is_measured_anew(
    cache: Path, measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster_named("local", ranks=2)
    monkeypatch.setattr(machine, "cpu_model", lambda: "another CPU")
    assert known_cluster("local", ranks=2) is None
    cluster_named("local", ranks=2)
    assert measured == [2, 2]


def test_a_remembered_file_that_cannot_be_read_is_measured_anew(cache: Path, measured: list[int]) -> None:
    cluster_named("local", ranks=2)
    next(cache.iterdir()).write_text("of another version")
    assert cluster_named("local", ranks=2) == load("cpu:2")
    assert measured == [2, 2]


def test_a_home_that_cannot_be_written_only_costs_the_memory(
    tmp_path: Path, measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cluster_named("local", ranks=2) == load("cpu:2")
    assert known_cluster("local", ranks=2) is None


def test_a_preset_or_a_file_is_never_measured(tmp_path: Path, measured: list[int]) -> None:
    save(load("cpu:4"), tmp_path / "mine.toml")
    assert cluster_named(str(tmp_path / "mine.toml"), ranks=9) == load("cpu:4")
    assert cluster_named("h100:16", ranks=9).num_devices == 16
    with pytest.raises(ClusterError):
        cluster_named("h1000", ranks=1)
    assert measured == []


def test_ranks_are_as_many_as_gpus_or_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("shardstage.runtime.environment.num_usable_cores", lambda: 6)
    assert num_default_ranks() == 6
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert num_default_ranks() == 8
