"""``report_page``: one HTML file with its style, its script and its data in it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from shardstage.report.about import About
from shardstage.timeline import STREAMS, Timeline
from shardstage.timeline.compare import compare_timelines, kind_of, rank_use

__all__ = ["page_style", "report_page", "write_report"]

_NANO = 1e9


def write_report(path: str | os.PathLike[str], about: About, timelines: Sequence[Timeline]) -> None:
    """Writes the page; raises OSError where it cannot be written."""
    Path(path).write_text(report_page(about, timelines), encoding="utf-8")


def report_page(about: About, timelines: Sequence[Timeline]) -> str:
    """The page of one timeline, or of a predicted and a measured one; everything it needs is in it."""
    data = {
        "title": about.title,
        "facts": [list(fact) for fact in about.facts],
        "tokens": about.tokens,
        "streams": list(STREAMS),
        "timelines": [_timeline(timeline) for timeline in timelines],
        "comparison": _comparison(timelines),
        "stages": {note.pp: note.stages for note in about.ranks},
    }
    page = _asset("page.html")
    parts = {
        "TITLE": _escaped(about.title),
        "STYLE": page_style(),
        "SCRIPT": _asset("page.js"),
        # A name with "</script>" or "<!--" in it would end the script that holds the data, or begin another.
        "DATA": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    }
    for name, text in parts.items():
        page = page.replace(f"<!--{name}-->", text)
    return page


def page_style() -> str:
    """The style sheet of every page."""
    return _asset("page.css")


def _asset(name: str) -> str:
    return (files("shardstage.report") / "assets" / name).read_text(encoding="utf-8")


def _timeline(timeline: Timeline) -> dict[str, Any]:
    """Ranks with their spans by stream, in nanoseconds; names are numbered, since most appear on many ranks."""
    names: dict[str, int] = {}
    ranks = []
    for rank in timeline.ranks:
        streams: list[list[int]] = [[] for _ in STREAMS]
        for span in timeline.spans_of(rank):
            place = streams[STREAMS.index(span.stream)]
            number = names.setdefault(span.name, len(names))
            place += [number, round(span.start_s * _NANO), round(span.end_s * _NANO)]
        use = rank_use(timeline, rank)
        ranks.append(
            {
                "rank": rank,
                "label": timeline.labels.get(rank, ""),
                "alike": list(timeline.alike.get(rank, (rank,))),
                "streams": streams,
                "use": [use.compute_s, use.update_s, use.exposed_s, use.idle_s],
            }
        )
    categories = list(dict.fromkeys(name for sample in timeline.memory for name in sample.bytes_by_category))
    memory: dict[int, list[list[Any]]] = {}
    for sample in timeline.memory:
        held = [sample.bytes_by_category.get(name, 0) for name in categories]
        memory.setdefault(sample.rank, []).append([round(sample.time_s * _NANO), sample.cause, *held])
    return {
        "source": timeline.source,
        "step_ns": round(timeline.step_time_s * _NANO),
        "names": list(names),
        "kinds": [kind_of(name).kind for name in names],
        "ranks": ranks,
        "categories": categories,
        "memory": memory,
    }


def _comparison(timelines: Sequence[Timeline]) -> Mapping[str, Any] | None:
    pair = {timeline.source: timeline for timeline in timelines}
    if len(pair) < 2:
        return None
    found = compare_timelines(pair["predicted"], pair["measured"])
    return {
        "error": found.error_ratio,
        "acts": [
            [act.kind, act.stage, act.predicted_s, act.measured_s, act.error_ratio] for act in found.acts
        ],
    }


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
