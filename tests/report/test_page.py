"""The page is one file that needs nothing else, and holds what the timelines say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tests.report.timelines import ABOUT, NUM_RANKS, timeline

from shardstage.report import report_page, write_report
from shardstage.timeline import Timeline


def data_of(page: str) -> dict[str, Any]:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert match is not None
    found: dict[str, Any] = json.loads(match.group(1))
    return found


def test_a_page_needs_no_network() -> None:
    page = report_page(ABOUT, [timeline()])
    assert not re.findall(r"(?:src|href)\s*=|@import|url\(|https?://", page)
    assert page.count("<script") == 2 and "<!--" not in page


def test_names_cannot_end_the_script_or_become_tags() -> None:
    page = report_page(ABOUT, [timeline()])
    assert "alert(1)</script>" not in page
    assert data_of(page)["facts"][1][1] == "</script><script>alert(1)</script>"
    assert "<title>a &lt;small&gt; model on 3 ranks</title>" in page


def test_spans_are_kept_in_nanoseconds_by_rank_and_stream() -> None:
    shown = timeline()
    (held,) = data_of(report_page(ABOUT, [shown]))["timelines"]
    assert held["step_ns"] == round(shown.step_time_s * 1e9)
    for rank in held["ranks"]:
        streams = dict(zip(("compute", "tp", "dp", "pp", "copy"), rank["streams"], strict=True))
        for stream, flat in streams.items():
            spans = shown.spans_of(rank["rank"], stream)
            assert len(flat) == 3 * len(spans)
            for i, span in enumerate(spans):
                number, start, end = flat[3 * i : 3 * i + 3]
                assert held["names"][number] == span.name
                assert (start, end) == (round(span.start_s * 1e9), round(span.end_s * 1e9))
    assert {held["kinds"][held["names"].index(name)] for name in ("0F0", "1F3")} == {"F"}


def test_ranks_that_are_alike_are_listed() -> None:
    (held,) = data_of(report_page(ABOUT, [timeline(alike=4)]))["timelines"]
    assert [len(rank["alike"]) for rank in held["ranks"]] == [4] * NUM_RANKS


def test_two_timelines_are_compared() -> None:
    data = data_of(report_page(ABOUT, [timeline(), timeline("measured", slower=1.25)]))
    errors = {(kind, stage): error for kind, stage, _, _, error in data["comparison"]["acts"]}
    assert errors["F", 0] == pytest.approx(-0.2)
    assert errors["STEP", None] == pytest.approx(0)
    assert data_of(report_page(ABOUT, [timeline()]))["comparison"] is None


def test_memory_is_kept_by_category() -> None:
    (held,) = data_of(report_page(ABOUT, [timeline()]))["timelines"]
    assert held["categories"] == ["parameters", "activations"]
    most = max(sum(row[2:]) for row in held["memory"]["0"])
    peak = timeline().peak(0)
    assert peak is not None and most == peak.total_bytes == 130


def test_an_empty_timeline_makes_a_page_too(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", ABOUT, [Timeline(source="predicted", spans=())])
    assert data_of((tmp_path / "report.html").read_text())["timelines"][0]["ranks"] == []
