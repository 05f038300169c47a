"""``rehearsal_text``: what a rehearsal found, in lines of 80 columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from shardstage.rehearsal.counts import Counts
from shardstage.rehearsal.rehearsal import RankRehearsal, Rehearsal
from shardstage.timeline import Timeline
from shardstage.timeline.compare import rank_use
from shardstage.units import format_bytes, format_ratio, format_s

__all__ = ["counts_text", "rehearsal_text"]

INDENT = 11
NUM_LARGEST = 4
MAX_KINDS = 16
"""Kinds of ranks that have a line of their own: the fullest."""


def rehearsal_text(
    found: Rehearsal,
    *,
    mfu: float,
    limit_of: Callable[[RankRehearsal], int],
    calibrated_s: tuple[float, float] | None = None,
) -> str:
    """What was proved, the step, what was executed, each kind of rank, and what the fullest holds.

    ``limit_of`` are the bytes that each kind of rank may hold, ``calibrated_s`` low and high seconds of the step, where runs on the
    cluster tell.
    """
    step = _step(found, mfu, calibrated_s)
    lines = [counts_text(found.counts), step, *_dry_run(found), "", *_ranks(found, limit_of)]
    return "\n".join(lines)


def counts_text(counts: Counts) -> str:
    """What a proof held for."""
    lines = [
        f"{counts.num_ranks:,} ranks of {_num(counts.num_kinds, 'kind')}, {counts.num_instructions:,} acts"
    ]
    if counts.num_messages:
        lines.append(
            f"{counts.num_messages:,} messages ({format_bytes(counts.message_bytes)}) sent, received, in order"
        )
    for axis, number in counts.collectives.items():
        groups = _num(counts.groups[axis], "group")
        lines.append(f"{number:,} {axis} collectives, in the same order on all ranks of {groups}")
    lines.append(
        f"{counts.num_parameters:,} parameters, {counts.num_summed:,} of them summed over the ranks that share them"
    )
    lines.append(f"{counts.num_samples:,} samples, each through every stage once; no rank waits for ever")
    return _entry("proved", lines)


def _step(found: Rehearsal, mfu: float, calibrated_s: tuple[float, float] | None) -> str:
    timeline, plan = found.timeline, found.plan
    step_s = timeline.step_time_s
    speed = f"{plan.global_batch / step_s:,.3g} samples/s"
    if plan.sequence is not None:
        speed = f"{plan.global_batch * plan.sequence / step_s:,.0f} tokens/s"
    shares = _shares(timeline)
    lines = [f"{format_s(step_s)} predicted: {speed}, MFU {format_ratio(mfu)}"]
    if calibrated_s is not None:
        low, high = map(format_s, calibrated_s)
        lines.append(f"calibrated by runs on this cluster: low {low}, high {high}")
    lines.append(
        f"a rank computes {format_ratio(shares[0])}, waits for talk {format_ratio(shares[1])}, "
        f"idles {format_ratio(shares[2])} of it"
    )
    return _entry("step", lines)


def _shares(timeline: Timeline) -> tuple[float, float, float]:
    """Compute, exposed communication and the rest over the step, the mean over all ranks."""
    totals, num_ranks = [0.0, 0.0, 0.0], 0
    for rank in timeline.ranks:
        use, times = rank_use(timeline, rank), len(timeline.alike.get(rank, (rank,)))
        parts = (use.compute_s + use.update_s, use.exposed_s, use.idle_s)
        for index, part in enumerate(parts):
            totals[index] += times * part
        num_ranks += times
    whole_s = max(num_ranks, 1) * (timeline.step_time_s or 1.0)
    return totals[0] / whole_s, totals[1] / whole_s, totals[2] / whole_s


def _dry_run(found: Rehearsal) -> Iterator[str]:
    executed = [rank for rank in found.ranks if rank.is_executed]
    if not executed:
        return
    few, most = executed[0].num_executed, executed[0].num_microbatches
    lines = [
        f"{len(executed)} of {found.counts.num_ranks:,} ranks executed by the engine's own code, "
        + ("all microbatches;" if few == most else f"{few} of {most}"),
    ]
    if few != most:
        lines.append("microbatches, as the others between them are alike;")
    differences = found.differences
    lines += [f"differs: {difference}" for difference in differences]
    if not differences:
        lines.append("every collective, message and shape as the program says; STEP too")
    if found.stored_bytes is not None:
        lines.append(
            f"a checkpoint of {format_bytes(found.stored_bytes)} keeps each element, and finds it again"
        )
    yield _entry("dry run", lines)


def _ranks(found: Rehearsal, limit_of: Callable[[RankRehearsal], int]) -> Iterator[str]:
    limits = " or ".join(format_bytes(limit) for limit in sorted({limit_of(rank) for rank in found.ranks}))
    yield f"{'rank':<8}{'alike':>7}  {'stages':<10}{'peak':>10}  {'at':<10}{'simulated':>10}   of {limits}"
    shown = sorted(found.ranks, key=lambda rank: -rank.peak_bytes)[:MAX_KINDS]
    for rank in sorted(shown, key=lambda rank: rank.rank):
        over_bytes = rank.peak_bytes - limit_of(rank)
        fits = "fits" if over_bytes <= 0 else f"{format_bytes(over_bytes)} too much"
        yield (
            f"{rank.rank:<8}{len(rank.alike):>7}  {_numbers(rank.stages):<10}{format_bytes(rank.peak_bytes):>10}  "
            f"{rank.act:<10}{format_bytes(rank.predicted_bytes):>10}   {fits}"
        )
    if len(found.ranks) > len(shown):
        yield f"and {len(found.ranks) - len(shown)} more, which hold less"
    fullest = found.fullest
    yield ""
    yield f"rank {fullest.rank} holds most, {format_bytes(fullest.peak_bytes)} at {fullest.act}:"
    yield from _held(fullest)


def _held(rank: RankRehearsal) -> Iterator[str]:
    """Categories, the biggest first, and the biggest things that were held."""
    by_size = sorted(rank.held.items(), key=lambda item: -item[1])
    line = "  "
    for number, (name, num_bytes) in enumerate(by_size):
        part = f"{name} {format_bytes(num_bytes)}" + ("," if number + 1 < len(by_size) else "")
        if len(line) + len(part) > 78:
            yield line.rstrip()
            line = "  "
        line += f"{part} "
    yield line.rstrip()
    for held in rank.largest[:NUM_LARGEST]:
        text = getattr(held, "what", None) or str(held)
        yield f"  {format_bytes(held.num_bytes):>9}  {text}"[:80]


def _numbers(stages: Sequence[int]) -> str:
    return ",".join(map(str, stages))


def _num(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def _entry(name: str, lines: Sequence[str]) -> str:
    """A name and its lines, indented alike."""
    return "\n".join(f"{name if not number else '':<{INDENT}}{line}" for number, line in enumerate(lines))
