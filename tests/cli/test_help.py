"""Help is how most people learn a program: it comes at once, fits a terminal and teaches by example."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from shardstage import __version__
from shardstage.cli.app import run

VERBS = ("plan", "rehearse", "train", "prove", "probe", "calibrate")
SOURCE = Path(__file__).parents[2] / "src"


def help_of(verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    assert run([verb, "--help"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_fits_80_columns_and_shows_examples(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = help_of(verb, capsys, monkeypatch)
    assert max(map(len, shown.splitlines())) <= 80
    assert f"Usage: shardstage {verb} [OPTIONS]" in shown
    assert "Example" in shown
    assert re.search(rf"^ +(Example +)?shardstage {verb} --", shown, re.MULTILINE)


@pytest.mark.parametrize("verb", (*VERBS, "report"))
def test_an_example_stands_on_one_line_so_that_it_can_be_pasted(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = re.findall(
        r"^ +(?:\[bold\]Example\[/\] +)?((?:shardstage|torchrun) .+)$",
        (SOURCE / "shardstage" / "cli" / f"{verb}.py").read_text(encoding="utf-8").partition("-> ")[2],
        re.MULTILINE,
    )
    shown = help_of(verb, capsys, monkeypatch).splitlines()
    assert examples
    for example in examples:
        assert any(line.strip().endswith(example) for line in shown), example


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_has_at_most_12_options_and_says_what_each_is_for(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = help_of(verb, capsys, monkeypatch)
    options = re.findall(r"^│ --([\w,-]+) +(?:-[ho] +)?(?:<[\w\[\]]+> +)?(\S.*?) +│$", shown, re.MULTILINE)
    names = [name for name, _ in options if name != "help"]
    assert 1 <= len(names) <= 12
    assert len(names) == len(re.findall(r"^│ --", shown, re.MULTILINE)) - 1, "one of them says nothing"


def test_paragraphs_of_help_flow_and_examples_stand_in(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A docstring's lines are longer than 80 columns: kept as they are, every other line of help was half empty."""
    shown = help_of("rehearse", capsys, monkeypatch)
    paragraph = [
        line.strip()
        for line in shown.partition("The plan is lowered")[2].partition("Exit code")[0].splitlines()
    ]
    assert all(len(line) > 60 for line in paragraph[1:-2])
    for verb in ("plan", "train"):
        assert f"\n   shardstage {verb} --" in help_of(verb, capsys, monkeypatch)


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"shardstage {__version__}\n"


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run(["--help"]) == 0
    shown = capsys.readouterr().out
    for verb in VERBS:
        assert re.search(rf"^│ {verb} +[A-Z]", shown, re.MULTILINE)


def test_help_comes_without_loading_torch() -> None:
    """torch and transformers take seconds to import; help must not."""
    code = "import sys; from shardstage.cli.app import run; run(['train', '-h']); sys.exit('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], cwd=SOURCE, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
