"""A Timeline in the trace event format, which chrome://tracing and ui.perfetto.dev open.

A rank is a process, a stream a thread, memory a counter; arrows go from each SEND to the RECV of its message.
Source: "Trace Event Format", Google, 2016.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from shardstage.timeline.timeline import STREAMS, Timeline

__all__ = ["timeline_to_trace"]

_MESSAGE = re.compile(r"(?P<stage>\d+)(?P<way>SEND|RECV)_(?P<kind>[FB])(?P<microbatch>\d+)[<>](?P<peer>\d+)")
_MICROSECONDS = 1e6


def timeline_to_trace(*timelines: Timeline) -> str:
    """The text of one trace file; of several timelines each rank has a process a timeline."""
    events = [
        event for number, timeline in enumerate(timelines) for event in _events(timeline, number * 1_000_000)
    ]
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def _events(timeline: Timeline, first_process: int) -> Iterator[dict[str, Any]]:
    for rank in timeline.ranks:
        process = first_process + rank
        alike = len(timeline.alike.get(rank, ()))
        label = f"{timeline.source} rank {rank}" + (f" (and {alike - 1} alike)" if alike > 1 else "")
        yield {"ph": "M", "pid": process, "name": "process_name", "args": {"name": label}}
        yield {"ph": "M", "pid": process, "name": "process_sort_index", "args": {"sort_index": process}}
        for number, stream in enumerate(STREAMS):
            yield {"ph": "M", "pid": process, "tid": number, "name": "thread_name", "args": {"name": stream}}
    for span in timeline.spans:
        place = {"pid": first_process + span.rank, "tid": STREAMS.index(span.stream)}
        start_us, took_us = span.start_s * _MICROSECONDS, span.duration_s * _MICROSECONDS
        yield {"ph": "X", **place, "name": span.name, "cat": span.stream, "ts": start_us, "dur": took_us}
        arrow = _arrow(span.name, first_process)
        if arrow is not None:
            ends = (
                {"ph": "s", "ts": start_us}
                if arrow["is_send"]
                else {"ph": "f", "bp": "e", "ts": start_us + took_us}
            )
            yield {**ends, **place, "name": "message", "cat": "pp", "id": arrow["id"]}
    for sample in timeline.memory:
        yield {
            "ph": "C",
            "pid": first_process + sample.rank,
            "name": "memory",
            "ts": sample.time_s * _MICROSECONDS,
            "args": dict(sample.bytes_by_category),
        }


def _arrow(name: str, first_process: int) -> dict[str, Any] | None:
    """The message that a SEND or RECV is one end of; both ends get the same id."""
    match = _MESSAGE.fullmatch(name)
    if match is None:
        return None
    is_send = match["way"] == "SEND"
    ends = (match["stage"], match["peer"]) if is_send else (match["peer"], match["stage"])
    return {
        "is_send": is_send,
        "id": f"{first_process}/{match['kind']}{match['microbatch']}/{ends[0]}>{ends[1]}",
    }
