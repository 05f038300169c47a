"""Holds predicted step times against published runs that nothing was fitted to: ``runs.toml``, and ``later.toml``.

Usage: python benchmarks/planner/elsewhere/run.py [--set runs] [--only GROUP] [--rows]
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from errors import print_run, print_table
from published import job_of, predict
from rows import SETS, rows
from software import software_of


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--set", default="runs", choices=SETS, help="which runs")
    parser.add_argument("--only", default="", help="part of a group's name")
    parser.add_argument("--rows", action="store_true", help="print every run")
    arguments = parser.parse_args()
    errors: dict[str, list[float]] = defaultdict(list)
    for row in rows(arguments.set):
        if arguments.only not in row["group"]:
            continue
        prediction = predict(job_of(row, software_of(row["software"], row["plan"])))
        measured_s = row["measured"]["step_time_s"]
        errors[row["group"]].append(prediction.step_time_s / measured_s - 1)
        if arguments.rows:
            print_run(row["id"], measured_s, prediction)
    if len(errors) > 1:
        errors["all"] = [error for group in errors.values() for error in group]
    print_table(errors)


if __name__ == "__main__":
    main()
