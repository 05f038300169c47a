"""Holds predicted step times against published runs that nothing was fitted to: ``runs.toml``.

Usage: python benchmarks/planner/elsewhere/run.py [--only GROUP] [--rows]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from published import job_of, predict
from rows import rows
from software import software_of


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="part of a group's name")
    parser.add_argument("--rows", action="store_true", help="print every run")
    arguments = parser.parse_args()
    errors: dict[str, list[float]] = defaultdict(list)
    for row in rows():
        if arguments.only not in row["group"]:
            continue
        prediction = predict(job_of(row, software_of(row["software"], row["plan"])))
        measured_s = row["measured"]["step_time_s"]
        errors[row["group"]].append(prediction.step_time_s / measured_s - 1)
        if arguments.rows:
            p = prediction
            print(
                f"{row['id']:28} {measured_s:8.3f} s {p.step_time_s:8.3f} s {100 * errors[row['group']][-1]:+6.1f} %  "
                f"dp {p.exposed_dp_s:.2f} tp {p.exposed_tp_s:.2f} pp {p.exposed_pp_s:.2f} "
                f"opt {p.optimizer_s:.3f} bubble {p.bubble_ratio:.2f} "
                + " ".join(f"{k} {v:.2f}" for k, v in p.parts.items())
            )
    print(
        "| runs | number | median error | mean of absolute errors | median of absolute errors |\n|---|---|---|---|---|"
    )
    for name, group in errors.items():
        print(_line(name, group))
    if len(errors) > 1:
        print(_line("all", [error for group in errors.values() for error in group]))


def _line(name: str, errors: list[float]) -> str:
    absolute = [abs(error) for error in errors]
    return (
        f"| {name} | {len(errors)} | {100 * statistics.median(errors):+.1f} % | {100 * statistics.mean(absolute):.1f} % "
        f"| {100 * statistics.median(absolute):.1f} % |"
    )


if __name__ == "__main__":
    main()
