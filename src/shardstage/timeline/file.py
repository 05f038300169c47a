"""A Timeline as a file: JSON, compressed where its name ends in ``.gz``, read back exactly."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from shardstage.errors import ProgramError
from shardstage.timeline.timeline import STREAMS, MemorySample, Span, Timeline

__all__ = ["load_timeline", "save_timeline", "timeline_from_json", "timeline_to_json"]

VERSION: Final = 1


def timeline_to_json(timeline: Timeline) -> str:
    """The text that ``timeline_from_json`` reads back as the equal Timeline."""
    return json.dumps(
        {
            "version": VERSION,
            "source": timeline.source,
            "spans": [[s.rank, s.stream, s.name, s.start_s, s.end_s] for s in timeline.spans],
            "memory": [[m.rank, m.time_s, dict(m.bytes_by_category), m.cause] for m in timeline.memory],
            "alike": [[rank, list(ranks)] for rank, ranks in timeline.alike.items()],
            "labels": [[rank, label] for rank, label in timeline.labels.items()],
        },
        separators=(",", ":"),
    )


def timeline_from_json(text: str, *, where: str = "timeline.json") -> Timeline:
    """Raises ``ProgramError`` for a text that is no Timeline of this version."""
    try:
        held = json.loads(text)
        if not isinstance(held, Mapping) or "version" not in held:
            raise ValueError("it has no version")
        if held["version"] != VERSION:
            raise ValueError(f"its version is {held['version']}, and this release reads {VERSION}")
        return Timeline(
            source=held["source"],
            spans=tuple(_span(row) for row in held["spans"]),
            memory=tuple(MemorySample(rank, at, held, cause) for rank, at, held, cause in held["memory"]),
            alike={rank: tuple(ranks) for rank, ranks in held["alike"]},
            labels=dict(held["labels"]),
        )
    except (ValueError, TypeError, KeyError) as error:
        raise ProgramError(
            f"{where} is no timeline: {error}", hint="shardstage train writes one into its run folder"
        ) from error


def save_timeline(timeline: Timeline, path: str | os.PathLike[str]) -> None:
    """Writes the file whole or not at all; raises OSError where it cannot be written."""
    target = Path(path)
    data = timeline_to_json(timeline).encode()
    if target.suffix == ".gz":
        data = gzip.compress(data, mtime=0)
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    partial.write_bytes(data)
    partial.replace(target)


def load_timeline(path: str | os.PathLike[str]) -> Timeline:
    """Reads a Timeline's file; ``ProgramError`` when it cannot be read or is none."""
    source = Path(path)
    try:
        data = source.read_bytes()
        text = (gzip.decompress(data) if source.suffix == ".gz" else data).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ProgramError(
            f"the timeline {source} cannot be read: {getattr(error, 'strerror', None) or error}",
            hint="shardstage train writes one into its run folder",
        ) from error
    return timeline_from_json(text, where=str(source))


def _span(row: Any) -> Span:
    rank, stream, name, start_s, end_s = row
    if stream not in STREAMS:
        raise ValueError(f"{stream!r} is no stream ({', '.join(STREAMS)})")
    return Span(rank, stream, name, start_s, end_s)
