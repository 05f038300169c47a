"""Holds predicted memory against published runs: bytes allocated, and which layouts did not fit.

Usage: python benchmarks/planner/memory/run.py [--rows]

Reads ``../shared/data`` beside the project and skips cleanly where that is absent.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hagemann
import llama_fork
import megatron_ci
import zero_bubble
from cases import Case, peak_bytes, state_bytes
from fits import fits
from published import DATA, rows

GB = 10**9
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Pair:
    set_name: str
    row: str
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rows", action="store_true", help="print every run")
    arguments = parser.parse_args()
    if not (DATA / "published-runs").exists():
        print("skipped: there is no ../shared/data/published-runs beside the project")
        return
    left_out: Counter[str] = Counter()
    pairs = [*_zero_bubble(), *_megatron_ci(left_out), *_llama_fork()]
    print("| runs | number | median error | 90 % below | mean of predicted / measured - 1 | within 5 % |")
    print("|---|---|---|---|---|---|")
    for name in dict.fromkeys(pair.set_name for pair in pairs):
        print(_line(name, [pair for pair in pairs if pair.set_name == name]))
    print("\nleft out of Megatron's CI:", ", ".join(f"{why} {n}" for why, n in left_out.most_common()))
    if arguments.rows:
        for pair in pairs:
            print(
                f"{pair.set_name:40} {pair.row:90} {pair.measured:9.4f} {pair.predicted:9.4f} {pair.error:+.3f}"
            )
    _out_of_memory(has_rows=arguments.rows)


def _line(name: str, pairs: list[Pair]) -> str:
    sizes = sorted(abs(pair.error) for pair in pairs)
    ninety = sizes[min(len(sizes) - 1, round(0.9 * (len(sizes) - 1)))]
    mean = statistics.fmean(pair.error for pair in pairs)
    near = sum(size <= 0.05 for size in sizes) / len(sizes)
    return f"| {name} | {len(sizes)} | {statistics.median(sizes):.2%} | {ninety:.1%} | {mean:+.1%} | {near:.0%} |"


def _zero_bubble() -> Iterator[Pair]:
    for row in rows("zero-bubble"):
        predicted = max(peak_bytes(zero_bubble.case_of(row))) / GB
        yield _pair("Zero Bubble, peak", row["id"], row["measured"]["peak_mem_GB"], predicted)


def _megatron_ci(left_out: Counter[str]) -> Iterator[Pair]:
    for ci in megatron_ci.read(DATA / "published-runs" / "megatron_ci_a100.jsonl"):
        why = megatron_ci.why_not(ci)
        if why:
            left_out[why] += 1
            continue
        case = megatron_ci.case_of(ci, is_flash=ci.backend != "unfused")
        measured = ci.row["measured"]
        if measured.get("allocated_mem_GB"):
            state = state_bytes(case)[-1] / GB
            yield _pair("Megatron CI, between steps", ci.name, measured["allocated_mem_GB"], state)
        if measured.get("peak_mem_GB"):
            said = "kernel stated" if ci.backend != "auto" else "kernel not stated, taken as fused"
            peak = peak_bytes(case)[-1] / GB
            yield _pair(f"Megatron CI, peak, {said}", ci.name, measured["peak_mem_GB"], peak)


def _llama_fork() -> Iterator[Pair]:
    for row in rows("megatron-fork-memory"):
        predicted = max(peak_bytes(llama_fork.case_of(row))) / GIB
        yield _pair("LLaMA-2 7B in a fork, peak", row["id"], row["measured"]["peak_mem_GB"], predicted)


def _pair(set_name: str, row: str, measured: float, predicted: float) -> Pair:
    return Pair(set_name=set_name, row=row, measured=measured, predicted=predicted)


def _out_of_memory(*, has_rows: bool) -> None:
    counts: Counter[tuple[str, bool]] = Counter()
    for row in rows("hagemann-2023"):
        case: Case = hagemann.case_of(row)
        is_fit = fits(case, partial(hagemann.stage_of, row, case))
        counts[row["kind"], is_fit] += 1
        if has_rows and is_fit != (row["kind"] == "run"):
            print(
                row["id"], row["kind"], "predicted to fit" if is_fit else "predicted not to fit", row["plan"]
            )
    total = counts.total()
    right = counts["run", True] + counts["oom", False]
    print(f"\nHagemann 13B: {right} of {total} right ({right / total:.1%});", end=" ")
    print(
        f"did not fit though predicted to: {counts['oom', True]} ({counts['oom', True] / total:.1%});",
        end=" ",
    )
    print(f"fitted though predicted not to: {counts['run', False]}")


if __name__ == "__main__":
    main()
