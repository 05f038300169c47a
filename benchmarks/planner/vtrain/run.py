"""Predicts vTrain's 1,440 measured runs, as the presets say and with six factors fitted on half of the models.

Usage: python benchmarks/planner/vtrain/run.py
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from runs import FILE, Factors, fitted, is_held_out, predicted_s, read_runs


def main() -> None:
    if not FILE.exists():
        print("skipped: there is no ../shared/data beside the project")
        return
    runs = read_runs()
    training, held_out = ([run for run in runs if is_held_out(run) is way] for way in (False, True))
    factors = fitted(training)
    print(
        "| models | runs | factors | mean of absolute errors | median | within 10 % |\n|---|---|---|---|---|---|"
    )
    for models, some in (("fitted on", training), ("held out", held_out)):
        for name, used in (("none", Factors()), ("fitted", factors)):
            seconds = predicted_s(some, used)
            errors = [abs(s / run.measured_s - 1) for s, run in zip(seconds, some, strict=True)]
            within = sum(error <= 0.1 for error in errors) / len(errors)
            print(
                f"| {models} | {len(some)} | {name} | {100 * statistics.mean(errors):.1f} % "
                f"| {100 * statistics.median(errors):.1f} % | {100 * within:.0f} % |"
            )
    print("factors: " + ", ".join(f"{name} {factor:.3f}" for name, factor in factors._asdict().items()))


if __name__ == "__main__":
    main()
