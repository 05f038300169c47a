"""Holds predicted step times against published runs, group by group, with one set of constants: the presets'.

Usage: python benchmarks/planner/step_time/run.py [--only GROUP] [--rows]
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from errors import print_run, print_table
from published import DATA, group_of, is_ours, job_of, measured_s, predict, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="part of a group's name")
    parser.add_argument("--rows", action="store_true", help="print every run")
    arguments = parser.parse_args()
    if not DATA.exists():
        print("skipped: there is no ../shared/data beside the project")
        return
    errors: dict[str, list[float]] = defaultdict(list)
    for row in rows():
        if not is_ours(row) or arguments.only not in row["group"]:
            continue
        prediction = predict(job_of(row))
        error = prediction.step_time_s / measured_s(row) - 1
        for name in dict.fromkeys((group_of(row), _source_of(row))):
            errors[name].append(error)
        if arguments.rows:
            print_run(row["id"], measured_s(row), prediction)
    print_table(errors)


def _source_of(row: dict[str, Any]) -> str:
    """All of a source's runs where it is cut into several groups; what is not alike is not summed up."""
    is_cut = row["group"] in ("mosaic-llm-foundry", "hagemann-2023", "bloom-prequel")
    return f"{row['group']}, all" if is_cut else group_of(row)


if __name__ == "__main__":
    main()
