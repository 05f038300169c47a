"""What a run folder tells a calibration, and which folders tell nothing."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tests.training.models import TINY
from tests.training.run_folders import log_steps, run_folder

from shardstage.cluster import load
from shardstage.cost.calibrate import calibrate
from shardstage.errors import ClusterError, ConfigError
from shardstage.training import RunConfig, run_config_to_toml
from shardstage.training.recorded import check_same_machine, observations_of, read_run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_folder(tmp_path_factory.mktemp("runs") / "whole")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def test_a_step_is_the_median_after_the_warm_up(folder: Path) -> None:
    log_steps(folder, 9.0, 8.0, 0.3, 0.1, 0.2)
    run = read_run(folder)
    assert run.step_time_s == 0.2
    assert (run.device_kind, run.device) == ("cpu", "Some CPU")
    assert (run.plan.mesh.dp, run.config.model) == (2, TINY)


def test_a_stopped_run_counts_by_its_log(folder: Path) -> None:
    log_steps(folder, 9.0, 8.0, 0.3)
    (folder / "summary.json").unlink()
    with (folder / "log.jsonl").open("a") as log:
        log.write('{"step": 3, "step_ti')
    run = read_run(folder)
    assert (run.step_time_s, run.device_kind, run.device) == (0.3, None, None)


def test_a_run_that_named_its_device_needs_no_summary_for_it(folder: Path) -> None:
    (folder / "summary.json").unlink()
    (folder / "run.toml").write_text(run_config_to_toml(RunConfig(device="cuda")))
    assert read_run(folder).device_kind == "cuda"


def test_a_folder_without_a_run_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not the folder of a training run: it has no run\.toml"):
        read_run(tmp_path)
    (folder / "plan.toml").unlink()
    with pytest.raises(ConfigError, match=r"it has no plan\.toml"):
        read_run(folder)


def test_a_run_of_warm_up_only_is_refused(folder: Path) -> None:
    log_steps(folder, 1.0, 1.0)
    with pytest.raises(ConfigError, match="logged 2 steps, and the first 2 are warm-up") as caught:
        read_run(folder)
    assert "shardstage train --run" in str(caught.value.hint)


def test_runs_of_several_machines_are_refused(folder: Path) -> None:
    ours = replace(read_run(folder), folder=Path("a"), device="One")
    theirs = replace(ours, folder=Path("b"), device="Two")
    with pytest.raises(ClusterError, match="the run a was made on One, the run b on Two") as caught:
        check_same_machine([ours, theirs])
    assert "once for the runs of each machine" in str(caught.value.hint)
    check_same_machine([ours, replace(theirs, device=None)])
    with pytest.raises(ClusterError, match="a was made on cpu, the run b on cuda"):
        check_same_machine([ours, replace(theirs, device=None, device_kind="cuda")])


def test_runs_for_several_clusters_are_refused_but_local_is_any(folder: Path) -> None:
    local = read_run(folder)
    one, two = (replace(local, folder=Path(n), config=RunConfig(cluster=n)) for n in ("one.toml", "two.toml"))
    check_same_machine([local, one])
    with pytest.raises(ClusterError, match=r"made for the cluster one\.toml, .* for the cluster two\.toml"):
        check_same_machine([local, one, two])


def test_a_run_is_held_against_the_formulas(whole: Path, tmp_path: Path) -> None:
    runs = [read_run(whole), read_run(run_folder(tmp_path / "b", plan="tp=2,mb=1"))]
    cluster = load("cpu:2")
    by_data, by_tensors = observations_of(runs, cluster)
    assert (by_data.measured_s, by_data.device_kind, by_data.name) == (0.2, "cpu", str(whole))
    assert by_data.parts["tp"] == 0 < by_tensors.parts["tp"]
    assert by_tensors.parts["dp"] < by_data.parts["dp"]
    calibrated = replace(cluster, calibration=calibrate([by_data], cluster, date="2026-01-31"))
    assert observations_of(runs[:1], calibrated) == (by_data,), "an earlier calibration does not count"


def test_a_run_of_a_model_that_has_changed_is_refused(whole: Path) -> None:
    run = read_run(whole)
    changed = replace(run, plan=replace(run.plan, graph_fingerprint="of another"))
    with pytest.raises(ConfigError, match="tiny has changed since the run"):
        observations_of([changed], load("cpu:2"))
