"""``shardstage report``: a page, a text or a trace of a run folder, and clear words where there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.report.timelines import timeline

from shardstage.cli.app import run
from shardstage.graph.capture import capture
from shardstage.graph.source import load_model
from shardstage.plan import complete, parse_request, plan_to_toml
from shardstage.timeline.file import save_timeline
from shardstage.training import RunConfig, run_config_to_toml
from shardstage.training.folder import RunFolder


@pytest.fixture(scope="module")
def plan_text() -> str:
    graph = capture(load_model("llama-tiny"), sequence=16)
    return plan_to_toml(complete(parse_request("pp=3,mb=1"), graph, num_ranks=3, global_batch=5, sequence=16))


@pytest.fixture
def folder(tmp_path: Path, plan_text: str) -> RunFolder:
    made = RunFolder(path=tmp_path / "run")
    made.path.mkdir()
    made.config.write_text(run_config_to_toml(RunConfig(ranks=3)))
    made.plan.write_text(plan_text)
    save_timeline(timeline("measured"), made.measured_timeline)
    return made


def test_a_page_is_written_into_the_run_folder(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["report", str(folder.path)]) == 0
    found = capsys.readouterr()
    assert "written to" in found.out and "nothing to compare with" in found.err
    assert "llama-tiny on 3 ranks" in (folder.path / "report.html").read_text()


def test_a_text_compares_what_was_predicted(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    save_timeline(timeline(slower=0.5), folder.predicted_timeline)
    assert run(["report", str(folder.path), "--text"]) == 0
    text = capsys.readouterr().out
    assert "batch     5 samples, 5 microbatches" in text and text.splitlines()[-1].startswith("predicted ")
    assert not (folder.path / "report.html").exists()


def test_a_trace_is_written_beside_the_page(folder: RunFolder, tmp_path: Path) -> None:
    trace, page = tmp_path / "trace.json", tmp_path / "page.html"
    assert run(["report", str(folder.path), "--trace", str(trace), "--out", str(page)]) == 0
    assert json.loads(trace.read_text())["traceEvents"] and page.exists()


def test_a_folder_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["report", str(tmp_path / "nothing")]) == 2
    text = capsys.readouterr().err
    assert "is not the folder of a run" in text and "hint: shardstage report" in text


def test_a_run_that_did_not_end_has_no_timeline(
    folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.measured_timeline.unlink()
    assert run(["report", str(folder.path)]) == 2
    assert "recorded no timeline" in capsys.readouterr().err


def test_a_page_that_cannot_be_written_is_named(
    folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["report", str(folder.path), "--out", str(folder.path / "no" / "page.html")]) == 2
    assert "cannot be written: No such file or directory" in capsys.readouterr().err
