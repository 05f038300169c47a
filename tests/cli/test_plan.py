"""``shardstage plan``: what the user reads, and what lands in the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from tests.cost.toy import toy_graph
from typer.testing import CliRunner

from shardstage.cli import plan as verb
from shardstage.cli.choosing import KnownModel
from shardstage.errors import PlanError
from shardstage.plan import load_plan

GRAPH = toy_graph(num_layers=6, width=64, hidden=256)


@pytest.fixture(autouse=True)
def captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy stands for any model: capture has tests of its own."""

    monkeypatch.setattr(
        verb, "known_model", lambda _name, _seq, _dtype: KnownModel(graph=GRAPH, max_sequence=1024)
    )


def said(*arguments: str) -> str:
    app = typer.Typer()
    app.command()(verb.plan)
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, list(arguments), catch_exceptions=True)
    if result.exception is not None:
        raise result.exception
    return result.output


def test_a_chosen_plan_is_shown_with_its_price_and_what_else_there_was() -> None:
    text = said("--cluster", "cpu:4", "--ranks", "4", "--seq", "64")
    for word in ("plan", "step time", "low", "high", "tokens/s, MFU", "memory", "plans considered", "slower"):
        assert word in text


def test_a_written_plan_loads_and_is_priced_the_same(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    first = said("--cluster", "cpu:4", "--plan", "tp=2,pp=2", "--seq", "64", "--out", str(path))
    plan = load_plan(path)
    assert (plan.mesh.tp, plan.mesh.pp, plan.global_batch, plan.sequence) == (2, 2, 16, 64)
    assert plan.graph_fingerprint
    assert f"written to {path}" in first
    again = said("--cluster", "cpu:4", "--plan", str(path), "--seq", "64")
    assert _line(again, "step time") == _line(first, "step time")


def test_explain_says_who_does_what() -> None:
    text = said("--cluster", "cpu:4", "--plan", "tp=2,pp=2", "--explain")
    for title in ("mesh     dp=1", "stages", "memory a rank", "talk a step"):
        assert title in text


def test_the_memory_that_a_rank_may_hold_is_kept() -> None:
    with pytest.raises(PlanError, match=r"none of \d+ plans for 4 ranks fits into 1.00 KiB"):
        said("--cluster", "cpu:4", "--memory", "1KiB")


def test_a_plan_that_does_not_fit_the_device_is_said() -> None:
    assert "it will not fit" in said(
        "--cluster", "cpu:4", "--plan", "mb=8192", "--batch", "32768", "--seq", "512"
    )


def test_a_plan_for_other_ranks_is_refused() -> None:
    with pytest.raises(PlanError, match="needs 2 ranks, and there are 4"):
        said("--cluster", "cpu:4", "--plan", "dp=2")


def test_samples_longer_than_the_model_s_limit_are_refused() -> None:
    with pytest.raises(PlanError, match="2048 tokens are longer than the 1024 positions"):
        said("--cluster", "cpu:4", "--seq", "2048")


def test_a_gpu_plans_in_bfloat16_and_the_flag_decides() -> None:
    with pytest.raises(PlanError, match="computes in bfloat16, and the model was captured in float32"):
        said("--cluster", "h100:4")
    assert "dtype=float32" in said("--cluster", "h100:4", "--dtype", "fp32")


def _line(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(name))
