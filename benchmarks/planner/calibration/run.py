"""What a few runs of a cluster do for predictions of its other runs: error and interval before and after ``calibrate``, by published group.

Usage: python benchmarks/planner/calibration/run.py [--draws 10]
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from published import DATA, group_of, is_ours, job_of, measured_s, predict, rows

from shardstage.cluster import Calibration, load
from shardstage.cost.calibrate import Observation, calibrate
from shardstage.cost.step import CALIBRATIONS

NUM_OWN_RUNS = (1, 2, 4, 8, 16)
LEAST_RUNS = 24
"""Of a group: enough are left to be predicted."""


class Score(NamedTuple):
    """Of runs that were predicted: median of absolute errors, share within the interval, width of the interval as a ratio."""

    error: float
    held: float
    width: float


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--draws", type=int, default=10, help="how often so many runs are drawn")
    arguments = parser.parse_args()
    if not DATA.exists():
        print("skipped: there is no ../shared/data beside the project")
        return
    groups: dict[str, list[Observation]] = defaultdict(list)
    for row in filter(is_ours, rows()):
        parts = predict(job_of(row)).parts
        groups[group_of(row)].append(
            Observation(name=row["id"], parts=parts, measured_s=measured_s(row), device_kind="cuda")
        )
    titles = ["runs", "number", "formulas", *(f"{count} own" for count in NUM_OWN_RUNS)]
    print("each: median of absolute errors, share within the 80 % interval, high over low of the interval\n")
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for name, runs in groups.items():
        if len(runs) >= LEAST_RUNS:
            cells = [_cell([_score(runs, None)])]
            cells += [_cell(_draws(runs, count, arguments.draws)) for count in NUM_OWN_RUNS]
            print(f"| {name} | {len(runs)} | {' | '.join(cells)} |", flush=True)


def _draws(runs: Sequence[Observation], count: int, num_draws: int) -> list[Score]:
    """Scores of the others, each time that ``count`` runs are drawn to calibrate from."""
    scores = []
    for seed in range(num_draws):
        own = random.Random(seed).sample(range(len(runs)), count)
        found = calibrate([runs[index] for index in own], load("a100-80"), date="2026-01-01")
        scores.append(_score([run for index, run in enumerate(runs) if index not in own], found))
    return scores


def _score(runs: Sequence[Observation], found: Calibration | None) -> Score:
    ranges = [(run.measured_s, _range_s(run, found)) for run in runs]
    return Score(
        statistics.median(abs(expected / measured - 1) for measured, (_, expected, _) in ranges),
        statistics.mean(low <= measured <= high for measured, (low, _, high) in ranges),
        statistics.median(high / low for _, (low, _, high) in ranges),
    )


def _range_s(run: Observation, found: Calibration | None) -> tuple[float, float, float]:
    if found is not None:
        return found.range_s(run.parts)
    low, expected, high = (ratio * run.modelled_s for ratio in CALIBRATIONS["cuda"])
    return low, expected, high


def _cell(scores: Sequence[Score]) -> str:
    error, held, width = (statistics.mean(values) for values in zip(*scores, strict=True))
    return f"{100 * error:.1f} %, {100 * held:.0f} %, {width:.2f}"


if __name__ == "__main__":
    main()
