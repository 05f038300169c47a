"""What the ranks of a run do, with real ranks; the engine's own arithmetic is tested in tests/runtime."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tests.training.models import TINY
from tests.training.rank_entries import STEPS, STOP, run_stop_and_resume

from shardstage import checkpoint
from shardstage.cluster import load
from shardstage.errors import CheckpointError, DataError
from shardstage.planner import predict
from shardstage.runtime.environment import leave_world, single_environment
from shardstage.runtime.launch import launch
from shardstage.training import RunConfig
from shardstage.training.folder import RunFolder
from shardstage.training.job import TrainJob
from shardstage.training.prepare import prepare
from shardstage.training.rank import join_job, train_joined, train_rank
from shardstage.training.table import print_plan, print_stopped, print_summary

OFFLOADED = ("pp=2,offload=optimizer", "dp=2,zero=1,offload=optimizer", "dp=2,zero=3,offload=optimizer")
PLANS = ("dp=2", "tp=2", "pp=2", "dp=2,zero=1", "dp=2,zero=3", *OFFLOADED)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("Everyone has the right to life, liberty and security of person. " * 40)
    run = RunConfig(model=TINY, steps=STEPS, global_batch=5, checkpoint_every=2, device="cpu")
    return run.with_changes(**{"data.paths": (str(text),), "data.sequence": 16, "optimizer.lr": 0.01})


@pytest.fixture(scope="module")
def jobs(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainJob]:
    """The runs of all plans, done."""
    folder = tmp_path_factory.mktemp("runs")
    prepared = {
        plan: prepare(replace(config, plan=plan), num_ranks=2, cluster=None, folder=folder / plan)
        for plan in PLANS
    }
    launch(run_stop_and_resume, (tuple(prepared.values()),), num_ranks=2, log_dir=folder / "logs")
    return prepared


@pytest.fixture
def world() -> Iterator[None]:
    yield
    leave_world()


def log_of(folder: str) -> list[dict[str, Any]]:
    """The lines of a log without their times, which no two runs share."""
    lines = RunFolder(path=Path(folder)).log_lines()
    return [{key: value for key, value in line.items() if key != "step_time_s"} for line in lines]


@pytest.mark.parametrize("plan", PLANS)
def test_a_resumed_run_has_bit_identical_losses(jobs: dict[str, TrainJob], plan: str) -> None:
    whole, resumed = log_of(jobs[plan].folder), log_of(f"{jobs[plan].folder}-resumed")
    assert [line["step"] for line in resumed] == list(range(STEPS)), "steps done again are logged once"
    assert resumed == whole
    assert whole[-1]["loss"] < whole[0]["loss"]


@pytest.mark.parametrize("plan", PLANS[1:])
def test_every_plan_trains_alike(jobs: dict[str, TrainJob], plan: str) -> None:
    reference, other = log_of(jobs[PLANS[0]].folder), log_of(jobs[plan].folder)
    losses = [[line["loss"] for line in lines] for lines in (reference, other)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)  # float32 sums in another order, 6 steps
    assert [line["num_targets"] for line in other] == [5 * 16] * STEPS


@pytest.mark.parametrize("plan", OFFLOADED)
def test_where_the_optimizer_lies_changes_no_bit_of_a_log(jobs: dict[str, TrainJob], plan: str) -> None:
    here = plan.removesuffix(",offload=optimizer")
    assert log_of(jobs[plan].folder) == log_of(jobs[here].folder)


def test_the_summary_holds_the_figures_of_every_rank(jobs: dict[str, TrainJob]) -> None:
    for plan, job in jobs.items():
        summary = json.loads((Path(job.folder) / "summary.json").read_text())
        lines = log_of(job.folder)
        assert (summary["first_loss"], summary["last_loss"]) == (lines[0]["loss"], lines[-1]["loss"])
        assert summary["steps"] == STEPS
        assert summary["tokens_per_s"] == pytest.approx(5 * 16 / summary["step_time_s"])
        assert len(summary["peak_bytes"]) == 2
        assert summary["device_kind"] == "cpu" and summary["device"]
        weights = 16 * job.graph.num_parameters  # float32: parameter, gradient and two moments
        shared = 1 if plan == "dp=2" else 4
        assert min(summary["peak_bytes"]) > weights / shared, plan


def test_the_newest_checkpoints_are_kept(jobs: dict[str, TrainJob]) -> None:
    for job in jobs.values():
        names = sorted(path.name for path in (Path(job.folder) / "checkpoints").iterdir())
        assert names == ["step-00000004", "step-00000006"]


def test_the_end_of_a_run_is_a_table_of_at_most_80_columns(jobs: dict[str, TrainJob]) -> None:
    job = jobs["pp=2"]
    console = Console(width=80, record=True, highlight=False, file=io.StringIO())
    print_plan(console, job)
    prediction = predict(job.graph, job.plan, load("cpu:2"))
    print_summary(console, job, prediction=prediction, is_proved=True)
    print_stopped(console, replace(job, config=replace(job.config, steps=9)))
    text = console.export_text()
    for part in (
        "dp=1, tp=1, pp=2 on 2 ranks, zero=0, 5 microbatches of 1, 1f1b",
        "loss, first → last step",
        "equal to a single device",
        "yes",
        "tokens/s",
        "step time, median",
        "peak memory, rank 1",
        f"{job.folder}/plan.toml",
        f"{job.folder}/checkpoints/step-00000006",
        f"stopped after 6 of 9 steps; step 6 is saved in {job.folder}/checkpoints",
        f"go on with: shardstage train --resume --out {job.folder}",
    ):
        assert part in text
    figures = text[text.index("measured") : text.index("settings")].splitlines()
    assert max(map(len, figures)) <= 80


def test_a_run_of_one_rank_needs_no_other_process(
    config: RunConfig,
    jobs: dict[str, TrainJob],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    world: None,
) -> None:
    job = prepare(replace(config, plan="dp=1"), num_ranks=1, cluster=None, folder=tmp_path / "run")
    train_rank(single_environment(), job)
    leave_world()
    losses = [line["loss"] for line in log_of(job.folder)]
    assert losses == pytest.approx([line["loss"] for line in log_of(jobs["dp=2"].folder)], rel=1e-5)
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == STEPS, "no terminal: a line a step, of ten at most"
    assert shown[0].startswith(f"step 1/{STEPS}  loss {losses[0]:.4f}  grad norm ")
    assert shown[0].endswith(" tokens/s")


def test_resuming_from_other_data_or_another_model_is_refused(
    config: RunConfig, tmp_path: Path, world: None
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("No one shall be held in slavery or servitude. " * 40)
    run = replace(config, plan="dp=1", steps=STOP).with_changes(**{"data.paths": (str(text),)})
    job = prepare(run, num_ranks=1, cluster=None, folder=tmp_path / "run")
    device = join_job(single_environment(), run)
    train_joined(single_environment(), job, device)
    again = replace(job, config=replace(job.config, resume=True, steps=STEPS))
    text.write_text("No one shall be subjected to torture. " * 60)
    with pytest.raises(DataError, match="other data"):
        train_joined(single_environment(), again, device)
    with pytest.raises(CheckpointError, match="are of another model"):
        train_joined(
            single_environment(), replace(again, plan=replace(job.plan, graph_fingerprint="other")), device
        )
    assert checkpoint.latest(tmp_path / "run" / "checkpoints") == STOP


def test_a_full_disk_ends_the_run_and_loses_nothing(config: RunConfig, tmp_path: Path, world: None) -> None:
    """/dev/full takes no byte, as a full disk does."""
    job = prepare(replace(config, plan="dp=1"), num_ranks=1, cluster=None, folder=tmp_path / "run")
    device = join_job(single_environment(), job.config)
    train_joined(single_environment(), job, device)
    files = RunFolder(path=tmp_path / "run")
    before = files.log.read_text(), files.summary.read_text()
    files.log.with_name("log.jsonl.partial").symlink_to("/dev/full")
    again = replace(job, config=replace(job.config, resume=True, steps=STEPS + 2))
    with pytest.raises(
        CheckpointError, match=r"log\.jsonl cannot be written: No space left on device\nhint: df -h"
    ):
        train_joined(single_environment(), again, device)
    files.summary.with_name("summary.json.partial").symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match=r"summary\.json cannot be written: No space left on device"):
        train_joined(single_environment(), replace(job, config=replace(again.config, steps=STEPS)), device)
    assert (files.log.read_text(), files.summary.read_text()) == before
    assert checkpoint.latest(files.checkpoints) == STEPS


def test_ranks_join_on_the_device_that_the_run_names(config: RunConfig, world: None) -> None:
    assert join_job(single_environment(), replace(config, device="cpu")) == torch.device("cpu")
