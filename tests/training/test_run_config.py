"""The run file: what is written is read back, and what is wrong is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from shardstage.data import DataConfig
from shardstage.errors import ConfigError, DataError
from shardstage.runtime.optimizer import OptimizerConfig
from shardstage.training import RunConfig, load_run_config, run_config_from_toml, run_config_to_toml


def test_every_setting_survives_the_file() -> None:
    config = RunConfig(
        model="models/mine",
        weights="models/mine",
        plan="dp=2,tp=2",
        cluster="h100:8",
        ranks=4,
        steps=7,
        global_batch=10,
        precision="bfloat16",
        seed=3,
        device="cpu",
        out='runs/"quoted" name',
        checkpoint_every=5,
        keep_checkpoints=4,
        resume=True,
        export_hf="exported",
        timeout_s=12.5,
        data=DataConfig(paths=("a.txt", "b/"), tokenizer="tok", sequence=33, seed=2, validation_ratio=0.1),
        optimizer=OptimizerConfig(
            kind="sgd",
            lr=0.1,
            betas=(0.8, 0.9),
            eps=1e-6,
            weight_decay=0.0,
            momentum=0.5,
            warmup_steps=3,
            total_steps=9,
            min_lr_ratio=0.2,
            max_grad_norm=None,
        ),
    )
    assert run_config_from_toml(run_config_to_toml(config)) == config
    assert run_config_from_toml(run_config_to_toml(RunConfig())) == RunConfig()


def test_an_empty_run_file_is_the_default_run(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("")
    assert load_run_config(tmp_path / "run.toml") == RunConfig()


def test_numbers_may_be_written_without_a_point_and_a_norm_of_zero_is_no_limit() -> None:
    config = run_config_from_toml("timeout_s = 5\n[optimizer]\nlr = 1\nmax_grad_norm = 0\nbetas = [0, 1]")
    assert (config.timeout_s, config.optimizer.lr) == (5.0, 1.0)
    assert config.optimizer.max_grad_norm is None
    assert config.optimizer.betas == (0.0, 1.0)
    assert run_config_from_toml("[optimizer]\nmax_grad_norm = 2").optimizer.max_grad_norm == 2.0


def test_changes_reach_the_sections() -> None:
    config = RunConfig().with_changes(steps=3, **{"data.sequence": 9, "optimizer.lr": 0.5})
    assert (config.steps, config.data.sequence, config.optimizer.lr) == (3, 9, 0.5)
    assert replace(config, steps=20, data=DataConfig(), optimizer=OptimizerConfig()) == RunConfig()


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("stepz = 3", "run.toml: unknown key 'stepz'", "steps = ..."),
        ("nothing_like_it = 3", "unknown key 'nothing_like_it'", "known: model, weights, plan"),
        ("[data]\npath = []", "run.toml [data]: unknown key 'path'", "paths = ..."),
        ("[optimiser]\nlr = 1", "run.toml: unknown key 'optimiser'", "[optimizer]"),
        ("data = 3", "run.toml [data] must be a table, not 3", "[data]"),
        ('steps = "3"', "run.toml: steps must be a whole number, not '3'", "steps = 20"),
        ("steps = 3.5", "run.toml: steps must be a whole number, not 3.5", "steps = 20"),
        ("steps = true", "run.toml: steps must be a whole number, not True", "steps = 20"),
        ("model = 3", "run.toml: model must be text, not 3", 'model = "llama-tiny"'),
        ("resume = 1", "run.toml: resume must be true or false, not 1", "resume = false"),
        ('timeout_s = "long"', "run.toml: timeout_s must be a number, not 'long'", "timeout_s = 600.0"),
        ('[data]\npaths = "text"', "run.toml [data]: paths must be a list of texts", 'paths = ["text"]'),
        ("[data]\npaths = [1]", "run.toml [data]: paths must be a list of texts", 'paths = ["text"]'),
        (
            "[optimizer]\nbetas = [0.9]",
            "[optimizer]: betas must be a list of 2 numbers",
            "betas = [0.9, 0.95]",
        ),
        ('[optimizer]\nkind = "adam"', "kind = 'adam' is not one of adamw, sgd", 'kind = "adamw"'),
        ("[optimizer]\nmax_grad_norm = -1", "max_grad_norm = -1.0 is negative", "max_grad_norm = 1.0"),
        ("[optimizer]\nlr = -1", "lr = -1.0 is negative", "lr = 0.001"),
        (
            'precision = "float16"',
            "losses want scaling, is planned and priced, but not run",
            'precision = "float32"',
        ),
        ('precision = "fp8"', "precision = 'fp8' is not one of float32, bfloat16, float64", "float32"),
        ('device = "tpu"', "device = 'tpu' is not one of auto, cpu, cuda", 'device = "cpu"'),
        ("ranks = 0", "ranks = 0 is too small", "ranks = 1"),
        ("keep_checkpoints = 0", "keep_checkpoints = 0 is too small", "keep_checkpoints = 2"),
        ("timeout_s = 0", "timeout_s = 0.0 is too small", "timeout_s = 600.0"),
        ("steps = ", "run.toml is not TOML: ", "llama-tiny"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(text: str, message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run_config_from_toml(text)
    assert message in caught.value.message
    assert hint in (caught.value.hint or "")
    assert "\n" not in caught.value.message


def test_a_section_refuses_values_that_it_alone_understands() -> None:
    with pytest.raises(DataError, match="a sequence of 0 tokens"):
        run_config_from_toml("[data]\nsequence = 0")


def test_a_run_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml cannot be read: No such file"):
        load_run_config(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.toml is not text"):
        load_run_config(tmp_path / "binary.toml")
    with pytest.raises(ConfigError, match="Is a directory"):
        load_run_config(tmp_path)
