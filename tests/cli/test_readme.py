"""What the README shows is run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from shardstage.cli.app import run
from shardstage.data import DataConfig
from shardstage.plan import parse_request
from shardstage.runtime.optimizer import OptimizerConfig
from shardstage.training import RunConfig, run_config_from_toml

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(language: str, containing: str) -> str:
    return next(
        text for text in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if containing in text
    )


def test_the_run_file_lists_every_setting_with_its_default() -> None:
    shown = block("toml", "[optimizer]")
    assert run_config_from_toml(shown) == RunConfig()
    num_settings = sum(len(fields(kind)) for kind in (RunConfig, DataConfig, OptimizerConfig))
    assert shown.count(" = ") == num_settings - 2, "the two tables are settings too"


def test_every_key_of_a_plan_is_one() -> None:
    rows = re.findall(r"^\| `([a-z]+(?:=[\w./*]+)?)` \|", README, re.MULTILINE)
    assert len(rows) >= 10
    for row in rows:
        parse_request(f"dp=2,{row}" if row.startswith("shares") else row)


def test_every_verb_that_is_shown_exists(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in sorted(set(re.findall(r"`shardstage ([a-z]+)", README))):
        assert run([verb, "--help"]) == 0
        options = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
        for command in re.findall(rf"shardstage {verb} ([^`\n]*)", README):
            assert set(re.findall(r"(?<![\w-])--[a-z-]+", command)) <= options, command


def test_every_link_leads_somewhere() -> None:
    folders = (ROOT / "docs", ROOT / "benchmarks")
    for page in (ROOT / "README.md", *(page for folder in folders for page in folder.rglob("*.md"))):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page}: {target}"


def ran(example: str, folder: Path) -> str:
    """What a Python example prints, run in a folder of its own."""
    (folder / "example.py").write_text(example)
    ended = subprocess.run(
        [sys.executable, "example.py"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_the_python_example_trains(tmp_path: Path) -> None:
    printed = ran(block("python", "launch(train"), tmp_path)
    losses = [float(loss) for loss in re.findall(r"step \d: loss (\d\.\d{4})", printed)]
    assert len(losses) == 3
    assert losses[2] < losses[0]


def test_the_python_example_places_operators(tmp_path: Path) -> None:
    first, *devices = ran(block("python", "place_model"), tmp_path).splitlines()
    assert re.fullmatch(r"any operator anywhere: \d\.\d% faster, at most \d\.\d% from the best", first)
    assert len(devices) == 2
    assert any("encoder" in device for device in devices) and any("decoder" in device for device in devices)
