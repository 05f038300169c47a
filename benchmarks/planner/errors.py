"""Errors of predicted step times, run by run and group by group, as the tables show them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from shardstage.cost import Prediction

__all__ = ["print_run", "print_table"]


def print_run(name: str, measured_s: float, prediction: Prediction) -> None:
    """A line: both times, how far they are apart, and what the prediction is made of."""
    p = prediction
    print(
        f"{name:62} {measured_s:8.3f} s {p.step_time_s:8.3f} s {100 * (p.step_time_s / measured_s - 1):+6.1f} %  "
        f"dp {p.exposed_dp_s:.2f} tp {p.exposed_tp_s:.2f} pp {p.exposed_pp_s:.2f} "
        f"opt {p.optimizer_s:.3f} bubble {p.bubble_ratio:.2f} "
        + " ".join(f"{cause} {seconds:.2f}" for cause, seconds in p.parts.items())
    )


def print_table(errors: Mapping[str, Sequence[float]]) -> None:
    """A row for each group: the number of its runs, and errors as shares of the measured time."""
    print("| runs | number | median error | mean of absolute errors | median of absolute errors |\n|---|---|---|---|---|")
    for name, group in errors.items():
        absolute = [abs(error) for error in group]
        print(
            f"| {name} | {len(group)} | {100 * statistics.median(group):+.1f} % | {100 * statistics.mean(absolute):.1f} % "
            f"| {100 * statistics.median(absolute):.1f} % |"
        )
