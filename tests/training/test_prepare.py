"""What the launcher refuses before a rank starts, and what it writes when it refuses nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.training.models import TINY

from shardstage.cluster import load
from shardstage.errors import CheckpointError, ConfigError, DataError, PlanError, ShardstageError
from shardstage.graph.file import fingerprint
from shardstage.plan import load_plan, save_plan
from shardstage.training import RunConfig, load_run_config
from shardstage.training.job import TrainJob
from shardstage.training.prepare import prepare, read_job
from shardstage.training.table import print_plan


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("All human beings are born free and equal in dignity and rights. " * 40)
    return path


@pytest.fixture
def config(text: Path) -> RunConfig:
    run = RunConfig(model=TINY, plan="dp=2", ranks=2, steps=3, global_batch=4)
    return run.with_changes(**{"data.paths": (str(text),), "data.sequence": 16})


def prepared(config: RunConfig, folder: Path, *, num_ranks: int = 2) -> TrainJob:
    return prepare(config, num_ranks=num_ranks, cluster=None, folder=folder)


def refusal(config: RunConfig, folder: Path, kind: type[ShardstageError], **changes: Any) -> str:
    """The message and hint with which the changed run is refused; nothing must be written then."""
    num_ranks = changes.pop("num_ranks", 2)
    with pytest.raises(kind) as caught:
        prepared(config.with_changes(**changes), folder, num_ranks=num_ranks)
    assert not folder.exists()
    assert caught.value.hint
    assert "\n" not in caught.value.message
    return str(caught.value)


def test_a_job_is_written_whole_and_read_back(config: RunConfig, tmp_path: Path) -> None:
    job = prepared(config, tmp_path / "run")
    assert (job.plan.mesh.dp, job.plan.shares, job.plan.precision) == (2, (2, 2), "float32")
    assert job.plan.graph_fingerprint == fingerprint(job.graph)
    written = load_run_config(tmp_path / "run" / "run.toml")
    assert written == replace(config, out=str(tmp_path / "run"))
    again = read_job(tmp_path / "run")
    assert (again.plan, again.config, again.folder) == (job.plan, job.config, job.folder)
    assert fingerprint(again.graph) == fingerprint(job.graph)


def test_a_plan_comes_from_a_search_a_shorthand_or_a_file(config: RunConfig, tmp_path: Path) -> None:
    searched = prepare(
        replace(config, plan="auto"), num_ranks=2, cluster=load("cpu:2"), folder=tmp_path / "searched"
    )
    assert searched.plan.mesh.world_size == 2
    save_plan(searched.plan, tmp_path / "plan.toml")
    filed = prepared(replace(config, plan=str(tmp_path / "plan.toml")), tmp_path / "filed")
    assert filed.plan == searched.plan
    low = prepared(replace(config, plan="tp=2,dtype=bf16"), tmp_path / "low")
    assert (low.plan.precision, low.config.precision) == ("bfloat16", "bfloat16")
    assert {low.graph.values[p.name].dtype for p in low.graph.parameters} == {"bfloat16"}


def test_a_plan_file_for_other_samples_is_refused_before_a_rank_starts(
    config: RunConfig, tmp_path: Path
) -> None:
    """A longer sample failed on the ranks, and another batch was silently the plan's."""
    save_plan(prepared(config, tmp_path / "run").plan, tmp_path / "plan.toml")
    filed = replace(config, plan=str(tmp_path / "plan.toml"))
    new = tmp_path / "new"
    said = refusal(filed, new, PlanError, global_batch=8)
    assert "is for 4 samples of 16 tokens a step, and not for 8 samples of 16 tokens" in said
    assert "hint: --batch 4 --seq 16" in said
    assert "and not for 4 samples of 32 tokens" in refusal(filed, new, PlanError, **{"data.sequence": 32})


def test_a_model_of_whole_modules_is_not_searched_but_shared_by_data(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A search took its one op for nothing, and tensor parallelism for as good: both ranks computed everything."""
    awkward = replace(config, model=TINY.replace(":tiny", ":awkward"), plan="auto")
    job = prepare(awkward, num_ranks=2, cluster=load("cpu:2"), folder=tmp_path / "run")
    assert job.graph.is_of_modules and not prepared(config, tmp_path / "other").graph.is_of_modules
    assert (job.plan.mesh.dp, job.plan.mesh.tp) == (2, 1)
    print_plan(Console(width=300), job)
    said = capsys.readouterr().out
    assert "data-dependent control flow" in said and "its ops are whole modules" in said


def test_a_run_that_goes_on_keeps_its_plan(config: RunConfig, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = prepare(replace(config, plan="auto"), num_ranks=2, cluster=load("cpu:2"), folder=folder)
    (folder / "checkpoints" / "step-00000002").mkdir(parents=True)
    resumed = replace(first.config, resume=True, steps=9)
    assert prepared(resumed, folder).plan == first.plan, "no second search, and no cluster needed"
    assert load_run_config(folder / "run.toml").steps == 9
    mesh = first.plan.mesh
    other = "dp=2,zero=1" if mesh.dp == 2 else "dp=2"
    with pytest.raises(PlanError, match="changing the plan of a run is not supported yet"):
        prepared(replace(resumed, plan=other), folder)
    with pytest.raises(ConfigError, match=r"data\.sequence = 16, and it was asked to go on with 8"):
        prepared(resumed.with_changes(**{"data.sequence": 8}), folder)
    with pytest.raises(PlanError, match=r"the plan is for 2 ranks .* and there are 3"):
        prepared(resumed, folder, num_ranks=3)
    assert load_plan(folder / "plan.toml") == first.plan


def test_a_folder_with_another_run_is_refused_before_anything_else(config: RunConfig, tmp_path: Path) -> None:
    prepared(config, tmp_path / "run")
    with pytest.raises(ConfigError, match="holds another run already"):
        prepared(replace(config, model="no such model"), tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"there is no run in .*new to resume"):
        prepared(replace(config, resume=True), tmp_path / "new")


def test_models_that_cannot_be_trained_on_text_are_refused(config: RunConfig, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert "model 'lama-tiny' is not known" in refusal(config, folder, ConfigError, model="lama-tiny")
    assert "vit-tiny is trained on" in refusal(config, folder, ConfigError, model="vit-tiny")
    missing = refusal(config, folder, ConfigError, model=f"{tmp_path}/none.py:make")
    assert "cannot be imported" in missing


def test_plans_that_do_not_fit_are_refused(config: RunConfig, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert "3 ranks" in refusal(config, folder, PlanError, plan="dp=3")
    assert "'dq' is not a key of a plan" in refusal(config, folder, PlanError, plan="dq=2")
    assert "--batch 8" in refusal(config, folder, PlanError, plan="dp=8", num_ranks=8)
    many = refusal(config, folder, PlanError, plan="pp=150", num_ranks=150)
    assert "stages at most" in many
    assert "needs to know the machine" in refusal(config, folder, ConfigError, plan="auto")
    assert "none.toml" in refusal(config, folder, PlanError, plan="none.toml")


def test_data_that_does_not_do_is_refused(config: RunConfig, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "binary.bin").write_bytes(b"\x00\x01")
    for name, message in (
        ("none.txt", "no file or folder"),
        ("short.txt", "the text has 6 tokens, but a sample of sequence 16 needs 17"),
        ("binary.bin", "is a binary file"),
    ):
        found = refusal(config, folder, DataError, **{"data.paths": (str(tmp_path / name),)})
        assert message in found
    few = refusal(config, folder, DataError, global_batch=1000)
    assert "the data holds 160 samples, and a step takes 1000\nhint: --batch 160" in few
    assert "tokenizer" in refusal(config, folder, DataError, **{"data.tokenizer": str(tmp_path / "none")})


def test_samples_longer_than_the_model_are_refused(config: RunConfig, tmp_path: Path) -> None:
    found = refusal(config, tmp_path / "run", ConfigError, model="bert-tiny", **{"data.sequence": 513})
    assert found.startswith("bert-tiny takes at most 512 tokens, and a sample has 513\nhint: --seq 512")


def test_an_export_or_weights_that_would_fail_after_the_training_fail_before_it(
    config: RunConfig, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert "is no Hugging Face model" in refusal(config, folder, ConfigError, export_hf=str(tmp_path / "hf"))
    assert "*.safetensors" in refusal(config, folder, ConfigError, weights=str(tmp_path))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    taken = refusal(config, folder, CheckpointError, model="bert-tiny", export_hf=str(tmp_path / "full"))
    assert "exists already" in taken


def test_a_gpu_that_is_not_there_is_refused(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    found = refusal(config, tmp_path / "run", ConfigError, device="cuda")
    assert 'device = "cuda", and torch sees no CUDA device here' in found


def test_stages_of_one_rank_that_share_a_parameter_cannot_be_fully_sharded(tmp_path: Path) -> None:
    config = RunConfig(model="gpt2-tiny", plan="dp=2,pp=2,schedule=zb-v,zero=3,mb=1", global_batch=8, ranks=4)
    with pytest.raises(
        PlanError, match=r"stages 0 and 3, which share transformer\.wte\.weight, are on one rank"
    ):
        prepare(config, num_ranks=4, cluster=None, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()
