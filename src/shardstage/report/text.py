"""A report in the terminal: the pipeline as a grid of characters, and a table of the ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from shardstage.report.about import About
from shardstage.timeline import Timeline
from shardstage.timeline.compare import compare_timelines, kind_of, rank_use
from shardstage.units import format_bytes, format_ratio, format_s

__all__ = ["report_text"]

WIDTH = 80
MAX_RANKS = 32
_MARKS = {"F": "F", "B": "B", "I": "I", "W": "W", "STEP": "s"}


def report_text(about: About, timelines: Sequence[Timeline]) -> str:
    """Lines of at most 80 columns: what ran, the grid of each timeline, how ranks spend the step."""
    lines = [about.title, *(f"{name:<10}{text}" for name, text in about.facts)]
    for timeline in timelines:
        lines += ["", *_grid(timeline), "", *_uses(timeline)]
    pair = {timeline.source: timeline for timeline in timelines}
    if len(pair) == 2:
        comparison = compare_timelines(pair["predicted"], pair["measured"])
        lines += [
            "",
            f"predicted {format_s(comparison.predicted_s)}, measured {format_s(comparison.measured_s)}: "
            f"{comparison.error_ratio:+.1%}",
        ]
    return "\n".join(line[:WIDTH] for line in lines) + "\n"


def _grid(timeline: Timeline) -> Iterator[str]:
    """A row for each rank, a column for each slice of time, the letter of what takes most of it."""
    ranks = timeline.ranks[:MAX_RANKS]
    width = WIDTH - 12
    slice_s = timeline.step_time_s / width or 1.0
    yield (
        f"{timeline.source}: {format_s(timeline.step_time_s)}, {format_s(slice_s)} a column"
        "   (s STEP, · idle or talk)"
    )
    for rank in ranks:
        shares: list[dict[str, float]] = [{} for _ in range(width)]
        for span in timeline.spans_of(rank, "compute"):
            mark = _MARKS.get(kind_of(span.name).kind)
            first, last = int(span.start_s / slice_s), min(width - 1, int(span.end_s / slice_s))
            for column in range(min(first, width - 1), last + 1) if mark else ():
                overlap = min(span.end_s, (column + 1) * slice_s) - max(span.start_s, column * slice_s)
                shares[column][mark or ""] = shares[column].get(mark or "", 0.0) + max(0.0, overlap)
        row = "".join(_mark(share, slice_s) for share in shares)
        yield f"rank {rank:<6}{row}"
    if len(timeline.ranks) > MAX_RANKS:
        yield f"and {len(timeline.ranks) - MAX_RANKS} more ranks"


def _mark(shares: dict[str, float], slice_s: float) -> str:
    mark = max(shares, key=lambda m: shares[m], default="")
    return mark if mark and sum(shares.values()) >= slice_s / 2 else "·"


def _uses(timeline: Timeline) -> Iterator[str]:
    yield f"{'rank':<31}{'compute':>9}{'exposed talk':>14}{'idle':>9}{'peak memory':>14}"
    for rank in timeline.ranks[:MAX_RANKS]:
        use = rank_use(timeline, rank)
        alike = len(timeline.alike.get(rank, ()))
        name = f"{rank} {timeline.labels.get(rank, '')}" + (f" ×{alike}" if alike > 1 else "")
        parts = (use.compute_s + use.update_s, use.exposed_s, use.idle_s)
        shares = [format_ratio(part / use.step_s) if use.step_s else "-" for part in parts]
        peak = "-" if use.peak_bytes is None else format_bytes(use.peak_bytes)
        yield f"{name[:31]:<31}{shares[0]:>9}{shares[1]:>14}{shares[2]:>9}{peak:>14}"
