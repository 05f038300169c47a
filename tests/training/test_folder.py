"""The run folder: one run in it, files that are whole, and what a run that goes on may change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shardstage.errors import CheckpointError, ConfigError, PlanError
from shardstage.layout import Mesh
from shardstage.plan import Plan, StageRange
from shardstage.training import RunConfig, load_run_config
from shardstage.training.folder import EarlierRun, RunFolder, replace_text

PLAN = Plan(
    mesh=Mesh(dp=2),
    stages=(StageRange(first="a", last="b"),),
    global_batch=4,
    sequence=8,
    microbatch=2,
    shares=(2, 2),
)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(path=tmp_path / "run")


def save_step(folder: RunFolder, step: int) -> None:
    (folder.checkpoints / f"step-{step:08d}").mkdir(parents=True)


def earlier(**changes: Any) -> EarlierRun:
    return EarlierRun(
        folder=Path("runs/a"), config=RunConfig(plan="dp=2").with_changes(**changes), plan=PLAN, step=5
    )


def test_a_new_run_takes_a_new_or_an_empty_folder(folder: RunFolder) -> None:
    folder.check_free()
    folder.path.mkdir()
    folder.check_free()
    (folder.path / "notes.txt").write_text("a file of the user's own is not a run")
    folder.check_free()


def test_a_new_run_refuses_a_folder_that_holds_one(folder: RunFolder) -> None:
    folder.write(RunConfig(), PLAN)
    with pytest.raises(ConfigError) as caught:
        folder.check_free()
    assert caught.value.message == f"{folder.path} holds another run already (run.toml)"
    assert caught.value.hint == f"--out {folder.path}-2 for a new run"
    save_step(folder, 3)
    Path(f"{folder.path}-2").mkdir()
    with pytest.raises(ConfigError) as caught:
        folder.check_free()
    assert (
        caught.value.hint
        == f"--out {folder.path}-3 for a new run, or --out {folder.path} --resume to go on with that one"
    )


def test_what_is_written_is_read_back_as_the_earlier_run(folder: RunFolder) -> None:
    config = RunConfig(plan="dp=2", steps=9, resume=True)
    folder.write(config, PLAN)
    for step in (4, 8):
        save_step(folder, step)
    run = folder.earlier_run()
    assert (run.plan, run.step, run.folder) == (PLAN, 8, folder.path)
    assert run.config == replace(config, resume=False), "the next run of this file is not to resume by itself"


def test_resuming_needs_a_run_that_saved_something(folder: RunFolder) -> None:
    with pytest.raises(
        CheckpointError, match=r"there is no run in .*run to resume\nhint: leave out --resume"
    ):
        folder.earlier_run()
    folder.write(RunConfig(), PLAN)
    with pytest.raises(CheckpointError, match="ended before its first checkpoint"):
        folder.earlier_run()
    (folder.checkpoints / "step-00000004.partial").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="ended before its first checkpoint"):
        folder.earlier_run()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "gpt2-tiny"}, 'has model = "llama-tiny", and it was asked to go on with "gpt2-tiny"'),
        ({"global_batch": 8}, "has global_batch = 16, and it was asked to go on with 8"),
        ({"seed": 4}, "has seed = 0"),
        ({"precision": "bfloat16"}, 'has precision = "float32"'),
        ({"data.sequence": 64}, "has data.sequence = 128, and it was asked to go on with 64"),
        ({"data.paths": ("a", "b")}, 'has data.paths = [], and it was asked to go on with ["a", "b"]'),
        ({"optimizer.kind": "sgd"}, 'has optimizer.kind = "adamw"'),
    ],
)
def test_a_run_goes_on_with_the_same_model_batch_and_text(changes: dict[str, Any], message: str) -> None:
    run = earlier()
    with pytest.raises(ConfigError) as caught:
        run.check_same_run(run.config.with_changes(**changes))
    assert message in caught.value.message
    assert "or a new run: --out runs/a-2" in (caught.value.hint or "")


def test_a_run_goes_on_with_more_steps_another_rate_and_other_checkpoints() -> None:
    run = earlier()
    changes = {"steps": 99, "checkpoint_every": 3, "timeout_s": 5.0, "optimizer.lr": 0.1, "export_hf": "x"}
    run.check_same_run(run.config.with_changes(**changes))


def test_a_run_does_not_change_its_plan() -> None:
    run = earlier()
    run.check_same_plan(PLAN)
    other = replace(PLAN, mesh=Mesh(tp=2), shares=(4,), microbatch=4)
    with pytest.raises(PlanError) as caught:
        run.check_same_plan(other)
    assert "follows the plan 'dp=2,mb=2', and it was asked to go on with 'dp=1,tp=2,mb=4'" in str(
        caught.value
    )
    assert "--resume without --plan" in str(caught.value)


def test_a_folder_that_cannot_be_made_is_refused_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"the run folder .*file/run cannot be written: Not a directory"):
        RunFolder(path=tmp_path / "file" / "run").write(RunConfig(), PLAN)


def test_a_file_is_replaced_whole_or_stays_as_it_was(folder: RunFolder) -> None:
    """Story: a resumed run on a full disk would have left an empty run.toml in place of the old one."""
    folder.write(RunConfig(steps=1), PLAN)
    full = folder.config.with_name("run.toml.partial")
    full.symlink_to("/dev/full")  # every write to it fails as on a full disk
    with pytest.raises(OSError, match="No space left on device"):
        replace_text(folder.config, "steps = 2")
    assert load_run_config(folder.config).steps == 1
    full.unlink(missing_ok=True)
    full.symlink_to("/dev/full")
    with pytest.raises(ConfigError, match=r"cannot be written: No space left on device\nhint: df -h"):
        folder.write(RunConfig(steps=2), PLAN)
    assert load_run_config(folder.config).steps == 1


def test_the_log_ends_before_a_line_that_was_cut_off(folder: RunFolder) -> None:
    assert list(folder.log_lines()) == []
    folder.path.mkdir()
    folder.log.write_text('{"step": 0, "loss": 3.5}\n{"step": 1, "loss": 3.0}\n{"step": 2, "lo')
    assert [line["step"] for line in folder.log_lines()] == [0, 1]


def test_a_run_is_done_when_its_last_step_and_its_figures_are_saved(folder: RunFolder) -> None:
    assert not folder.is_done(4)
    save_step(folder, 4)
    assert not folder.is_done(4)
    folder.summary.write_text("{}")
    assert folder.is_done(4)
    assert not folder.is_done(5)
