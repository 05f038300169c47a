"""The trace of a timeline: processes, threads, counters, and an arrow for each message."""

from __future__ import annotations

import json
from typing import Any

from shardstage.timeline import MemorySample, Span, Timeline
from shardstage.timeline.trace import timeline_to_trace

TIMELINE = Timeline(
    source="measured",
    spans=(
        Span(0, "compute", "0F0", 0.0, 0.5),
        Span(0, "pp", "0SEND_F0>1", 0.5, 0.75),
        Span(1, "pp", "1RECV_F0<0", 0.0, 0.75),
        Span(1, "compute", "1F0", 0.75, 1.0),
    ),
    memory=(MemorySample(0, 0.5, {"activations": 7}, "0F0"),),
    alike={0: (0, 2, 4), 1: (1,)},
)


def events(*timelines: Timeline) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(timeline_to_trace(*timelines))["traceEvents"]
    return found


def test_every_span_is_a_complete_event_in_microseconds() -> None:
    complete = [event for event in events(TIMELINE) if event["ph"] == "X"]
    first = complete[0]
    assert (first["name"], first["pid"], first["ts"], first["dur"]) == ("0F0", 0, 0.0, 500000.0)
    assert len(complete) == len(TIMELINE.spans)


def test_an_arrow_goes_from_a_send_to_its_receive() -> None:
    begins = [event for event in events(TIMELINE) if event["ph"] == "s"]
    ends = [event for event in events(TIMELINE) if event["ph"] == "f"]
    assert [e["id"] for e in begins] == [e["id"] for e in ends]
    assert (begins[0]["pid"], begins[0]["ts"]) == (0, 500000.0)
    assert (ends[0]["pid"], ends[0]["ts"]) == (1, 750000.0)


def test_ranks_are_named_with_those_they_stand_for() -> None:
    names = [e["args"]["name"] for e in events(TIMELINE) if e["name"] == "process_name"]
    assert names == ["measured rank 0 (and 2 alike)", "measured rank 1"]


def test_memory_is_a_counter() -> None:
    (counter,) = [event for event in events(TIMELINE) if event["ph"] == "C"]
    assert (counter["ts"], counter["args"]) == (500000.0, {"activations": 7})


def test_two_timelines_have_processes_and_arrows_of_their_own() -> None:
    both = events(TIMELINE, TIMELINE)
    assert {e["pid"] for e in both} == {0, 1, 1_000_000, 1_000_001}
    assert len({e["id"] for e in both if e["ph"] == "s"}) == 2
