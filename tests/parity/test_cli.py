"""``shardstage prove`` as it is typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.parity import models

from shardstage.cli.app import run

OPTIONS = ["prove", "--batch", "2", "--seq", "16", "--steps", "1", "--data", str(models.__file__)]


def typed(*more: str) -> int:
    return run([*OPTIONS, "--model", f"{models.__file__}:decoder", *more])


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_that_is_not_equal_exits_with_1_and_says_why(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = typed("--plan", "dp=1", "--inject-fault", "doubled-loss", "--report", "verdict.json")
    said = capsys.readouterr().out
    assert code == 1
    for text in ("NOT EQUAL", "first at  ", "rank 0", "doubled loss", "the loss is counted 2 times"):
        assert text in said
    report = json.loads((folder / "verdict.json").read_text(encoding="utf-8"))
    assert report["is_equal"] is False and report["cause"]["name"] == "doubled loss"
    assert list(folder.glob("runs/*-prove/plan.toml")) and not list(folder.glob("runs/*/prove-*"))


UNET = Path(__file__).parents[2] / "examples" / "unet.py"


@pytest.mark.parametrize(
    ("model", "ranks", "batch"),
    [(f"{UNET}:unet", 3, 5), ("t5-tiny", 4, 3)],
    ids=["U-Net, 3 stages", "T5, 4 stages"],
)
def test_stages_that_form_a_dag_are_equal(
    model: str, ranks: int, batch: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Skip connections and an encoder that every decoder layer reads go past stages, straight to who needs them."""
    asked = [
        "--ranks",
        str(ranks),
        "--plan",
        f"pp={ranks},mb=1",
        "--batch",
        str(batch),
        "--seq",
        "15",
        "--steps",
        "2",
    ]
    assert run(["prove", "--model", model, *asked]) == 0
    assert "EQUAL: the run computes what one device computes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "said", "hint"),
    [
        (["--inject-fault", "lost-sleep"], "there is no fault 'lost-sleep'", "--inject-fault missing-reduction"),
        (["--inject-fault", "lost-tie"], "needs a parameter that several stages share", "pp=2"),
        (["--inject-fault", "missing-reduction"], "needs a plan with dp > 1", "dp=2"),
        (["--inject-fault", "missing-tp-reduction"], "needs a plan with tp > 1", "tp=2"),
        (["--precision", "bfloat16", "--inject-fault", "dtype"], "needs a run in a finer dtype", "float32"),
        (["--steps", "0"], "a run of no steps has nothing to compare", "--steps 4"),
        (["--report", "no/such/folder/verdict.json", "--steps", "0"], "no steps", "--steps"),
        (["--precision", "float8"], "precision = 'float8' is not one of", "precision ="),
    ],
)  # fmt: skip
def test_bad_input_exits_with_2_and_a_hint(
    more: list[str], said: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed("--plan", "dp=1", *more) == 2
    shown = capsys.readouterr().err
    assert said in shown and hint in shown.split("hint:")[1]


def test_the_faults_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert typed("--inject-fault", "list") == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 7 and all(len(line) <= 80 for line in listed)
    assert listed[0].split(None, 1) == ["missing-reduction", "gradients are not summed over dp"]
