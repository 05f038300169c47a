"""Who waits for a capture is told why: once, late, and never on stdout."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from shardstage.cli import plan as plan_verb
from shardstage.cli import waiting
from shardstage.cli.app import run
from shardstage.cli.choosing import KnownModel, known_model
from shardstage.cli.waiting import capturing


def test_a_short_capture_says_nothing_where_nobody_looks_at_a_status(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with capturing(Console(), "mamba", sequence=512):
        pass
    assert capfd.readouterr() == ("", "")


def test_a_long_capture_explains_itself_in_the_status_of_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(waiting, "PATIENCE_S", 0.01)
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=200)
    with capturing(console, "mamba", sequence=512, is_kept=True):
        while "minutes" not in screen.getvalue():
            time.sleep(0.01)
    assert (
        "minutes where a model loops over its 512 tokens op by op, seconds else; cached afterwards"
        in screen.getvalue()
    )
    assert capfd.readouterr() == ("", "")


def test_json_stands_alone_on_stdout_however_long_the_capture_takes(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A Mamba of 512 tokens was captured for two minutes without a word. What a capture prints meanwhile is kept off the screen."""

    def slow(model: str, sequence: int, precision: str) -> KnownModel:
        with pytest.MonkeyPatch.context() as inside:
            inside.setattr("sys.stderr", io.StringIO())
            time.sleep(0.5)
        return known_model(model, sequence, "bfloat16")

    monkeypatch.setattr(plan_verb, "known_model", slow)
    monkeypatch.setattr(waiting, "PATIENCE_S", 0.1)
    assert run("plan --cluster h100:2 --seq 16 --plan dp=2 --json".split()) == 0
    shown = capfd.readouterr()
    assert shown.out.startswith("{")
    (line,) = [line for line in shown.err.splitlines() if "still capturing" in line]
    assert line.startswith(
        "still capturing llama-tiny: minutes where a model loops over its 16 tokens op by op"
    )


def test_a_long_rehearsal_says_what_takes_so_long(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One of an 8B on 512 ranks took minutes without a word where nobody looks at a status."""
    monkeypatch.setattr(waiting, "PATIENCE_S", 0.01)
    assert run("rehearse --plan dp=2,zero=3 --cluster h100:2 --seq 16".split()) == 0
    shown = capfd.readouterr()
    (line,) = [line for line in shown.err.splitlines() if "still rehearsing" in line]
    assert line.startswith("still rehearsing dp=2,zero=3")
    assert "op by op on tensors without data" in line
    assert "still" not in shown.out
