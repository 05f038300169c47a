"""``shardstage calibrate``: what the user reads, and what lands in the cluster file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tests.training.run_folders import log_steps, run_folder

from shardstage.cli.app import run
from shardstage.cluster import load, save
from shardstage.graph.fallback import capture_or_blocks
from shardstage.planner import predict
from shardstage.training.job import source_of
from shardstage.training.recorded import observations_of, read_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three runs whose steps took 1.4 times what the formulas say, give or take a little."""
    home = tmp_path_factory.mktemp("runs")
    plans = {"data": "dp=2", "tensor": "tp=2", "pipe": "pp=2,mb=1"}
    folders = [run_folder(home / name, plan=plan) for name, plan in plans.items()]
    seen = observations_of([read_run(folder) for folder in folders], load("cpu:2"))
    for folder, each, ratio in zip(folders, seen, (1.38, 1.4, 1.43), strict=True):
        log_steps(folder, *[9.0, 8.0, *[ratio * each.modelled_s] * 3])
    return [str(folder) for folder in folders]


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    path = tmp_path / "laptop.toml"
    save(load("cpu:2"), path)
    return path


def test_factors_go_into_the_cluster_file_and_errors_are_shown(
    runs: list[str], cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["calibrate", *runs, "--cluster", str(cluster)]) == 0
    found = load(cluster).calibration
    assert found is not None
    assert (found.num_runs, found.device_kind, found.cluster) == (3, "cpu", load("cpu:2").name)
    assert 1 <= min(found.factors.values()) < 1.2 < max(found.factors.values()) < 1.45
    said = capsys.readouterr().out
    for word in ("cause", "80 % interval", "by the others", "mean error", "8 of 10 steps"):
        assert word in said
    products = next(line for line in said.splitlines() if line.startswith("products"))
    assert f"{found.factors['products']:.2f}" in products and "3 runs" in products
    mean = next(line for line in said.splitlines() if line.startswith("mean error")).split()
    before, after = float(mean[2]), float(mean[4])
    assert 28 < before < 30 and after < before / 2
    assert f"written to {cluster}: shardstage plan --cluster {cluster}" in said.replace("\n", " ")


def test_runs_that_have_nothing_to_do_with_the_cluster_raise_a_doubt(
    runs: list[str], tmp_path: Path, cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = Path(shutil.copytree(runs[0], tmp_path / "slow"))
    log_steps(slow, 9.0, 8.0, 60.0)
    assert run(["calibrate", str(slow), "--cluster", str(cluster)]) == 0
    said = capsys.readouterr().out
    assert "times off the formulas" in said and "no run" in said
    assert run(["calibrate", runs[0], "--cluster", str(cluster)]) == 0
    assert "times off the formulas" not in capsys.readouterr().out


def test_calibrating_again_starts_from_the_formulas(runs: list[str], cluster: Path) -> None:
    texts = []
    for _ in range(2):
        assert run(["calibrate", *runs, "--cluster", str(cluster)]) == 0
        texts.append(cluster.read_text())
    assert texts[0] == texts[1]


def test_another_file_can_be_written(runs: list[str], cluster: Path, tmp_path: Path) -> None:
    out = tmp_path / "ours.toml"
    assert run(["calibrate", runs[0], "--cluster", "cpu:2", "--out", str(out)]) == 0
    assert load(out).calibration is not None
    assert load(cluster).calibration is None


def test_without_a_run_it_says_how(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["calibrate"]) == 2
    said = capsys.readouterr().err
    assert "needs the folder of at least one run" in said and "hint: shardstage calibrate runs/" in said


def test_a_folder_that_is_no_run_is_refused(
    tmp_path: Path, cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["calibrate", str(tmp_path), "--cluster", str(cluster)]) == 2
    assert "is not the folder of a training run" in capsys.readouterr().err


def test_proofs_and_short_runs_are_left_out(
    runs: list[str], cluster: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``runs/*`` names the folders of proofs, too: with one of them nothing was calibrated."""
    proof = run_folder(tmp_path / "today-prove", plan="dp=2")
    log_steps(proof)
    assert run(["calibrate", str(proof), *runs, "--cluster", str(cluster)]) == 0
    assert f"left out   the run in {proof} logged 0 steps" in capsys.readouterr().out
    found = load(cluster).calibration
    assert found is not None and found.num_runs == 3
    assert run(["calibrate", str(proof), "--cluster", str(cluster)]) == 2
    assert "error: the run in" in capsys.readouterr().err


def test_runs_of_another_kind_of_device_are_refused(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.toml"
    assert run(["calibrate", *runs, "--cluster", "h100:8", "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert "was on cpu" in said and "hint: leave out" in said
    assert not out.exists()


def test_runs_of_different_machines_are_refused(
    runs: list[str], tmp_path: Path, cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(runs[0], tmp_path / "other"))
    (other / "summary.json").write_text('{"device": "Another CPU"}')
    assert run(["calibrate", runs[0], str(other), "--cluster", str(cluster)]) == 2
    said = capsys.readouterr().err
    assert "Some CPU" in said and "Another CPU" in said and "once for the runs of each machine" in said


def test_runs_over_several_classes_of_devices_are_read_back(runs: list[str], tmp_path: Path) -> None:
    both, out = load("a100-40:1+h100:1"), tmp_path / "both.toml"
    folders = [Path(shutil.copytree(run, tmp_path / Path(run).name)) for run in (runs[0], runs[2])]
    for folder in folders:
        (folder / "summary.json").write_text('{"device_kind": "cuda", "device": "Some GPU"}')
    recorded = [read_run(folder) for folder in folders]
    seen = observations_of(recorded, both)
    for folder, each in zip(folders, seen, strict=True):
        log_steps(folder, *[9.0, 8.0, *[1.4 * each.modelled_s] * 3])
    asked = ["--cluster", "a100-40:1+h100:1", "--out", str(out)]
    assert run(["calibrate", *map(str, folders), *asked]) == 0
    found = load(out)
    assert found.calibration is not None and found.is_mixed
    for again, each in zip(observations_of(recorded, found), seen, strict=True):
        assert again.parts == each.parts, "a second calibration starts from the formulas"
    graph = capture_or_blocks(source_of(recorded[0].config), sequence=16, dtype="float32")
    for each_run, each in zip(recorded, seen, strict=True):
        predicted_s = predict(graph, each_run.plan, found).step_time_s
        assert each.modelled_s * 1.1 < predicted_s < each.modelled_s * 1.45
