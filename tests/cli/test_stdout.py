"""Standard output that cannot be written: one line on stderr, or none where the reader of a pipe left; never a traceback."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from shardstage.cli.stdout import EXIT_CLOSED_PIPE, guarded_stdout
from shardstage.errors import ConfigError, ParityError

SOURCE: Final = Path(__file__).parents[2] / "src"
PRINTING: Final = ("--version", "--help", "plan --help", "prove --inject-fault list")
"""By click, by rich, and by a verb."""


def ended(command: str, stdout: int, *, buffered: str = "") -> subprocess.CompletedProcess[str]:
    variables = os.environ | {"PYTHONPATH": str(SOURCE), "PYTHONUNBUFFERED": buffered}
    typed = [sys.executable, "-m", "shardstage", *command.split()]
    return subprocess.run(typed, env=variables, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60)


@pytest.mark.parametrize("command", PRINTING)
def test_a_full_disk_is_said_in_one_line(command: str) -> None:
    """It was a traceback, or the interpreter's "Exception ignored" and exit code 120."""
    with Path("/dev/full").open("wb") as full:
        said = ended(command, full.fileno())
    assert said.returncode == 2
    assert said.stderr.splitlines()[0] == "error: standard output cannot be written: No space left on device"
    assert len(said.stderr.splitlines()) == 2, "and a hint"


@pytest.mark.parametrize("command", PRINTING)
@pytest.mark.parametrize("buffered", ["", "1"])
def test_a_closed_pipe_ends_quietly(command: str, buffered: str) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        said = ended(command, write, buffered=buffered)
    finally:
        os.close(write)
    assert (said.returncode, said.stderr) == (EXIT_CLOSED_PIPE, "")


def test_a_plan_is_written_whether_or_not_all_is_read_that_is_printed(tmp_path: Path) -> None:
    """``shardstage plan --out plan.toml | head`` once left no plan."""
    out = tmp_path / "plan.toml"
    typed = [*"plan --cluster cpu:2 --plan dp=2 --seq 16 --batch 4 --out".split(), str(out)]
    variables = os.environ | {"PYTHONPATH": str(SOURCE), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "shardstage", *typed],
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline()
        running.stdout.close()
        assert running.wait(timeout=60) == EXIT_CLOSED_PIPE
    assert out.stat().st_size > 0


class Full(io.StringIO):
    """Holds what it is given until it is to be written: as a buffered file on a full disk."""

    def flush(self) -> None:
        raise OSError(28, "No space left on device")


def test_what_is_still_in_the_buffer_at_the_end_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """An object of ``--json`` is written and not flushed: the verb had ended well by then."""
    full = Full()
    monkeypatch.setattr(sys, "stdout", full)
    with pytest.raises(ConfigError, match="No space left on device"), guarded_stdout():
        sys.stdout.write("{}")
    assert sys.stdout is full


def test_a_loss_that_somebody_swallows_is_raised_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """click writes nothing at all to see what a stream is, and keeps to itself that it failed."""
    monkeypatch.setattr(sys, "stdout", Full())
    with pytest.raises(ConfigError), guarded_stdout():
        with pytest.raises(ConfigError):
            sys.stdout.flush()
        sys.stdout.write("lost")
        pytest.fail("nothing was raised")


def test_an_error_is_not_hidden_by_output_that_could_not_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Full())
    with pytest.raises(ParityError), guarded_stdout():
        raise ParityError("not equal")


def test_without_a_standard_output_nothing_is_shown_and_all_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    with guarded_stdout():
        sys.stdout.write("nobody reads this")
    assert sys.stdout is None
