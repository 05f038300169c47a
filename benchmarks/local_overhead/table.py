"""Medians, quartiles and ratios of the turns of all configurations; the markdown tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

from job import Configuration, Turn
from phases import PHASES

__all__ = ["Row", "check_losses", "phase_table", "rows", "time_table"]

TARGETS: Mapping[str, float] = {"dp": 1.00, "zero3": 1.04, "tp": 1.10, "pp": 1.06}
"""Most time relative to the one process that issue 2 allows."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One configuration: quartiles of seconds a step; medians over rounds of the ratio *within* a round, so that noise cancels.

    ``cpu_s`` is what all ranks' cores worked on a step: it hardly depends on what else the machine does.
    """

    name: str
    num_ranks: int
    lower_s: float
    median_s: float
    upper_s: float
    cpu_s: float
    to_single_ratio: float
    to_peer_ratio: float | None
    target_ratio: float | None


def rows(configurations: Sequence[Configuration], turns: Mapping[str, Sequence[Turn]]) -> list[Row]:
    """One for each configuration of a group, which holds the one process and every peer that is named."""
    times_s = {name: [turn.step_s for turn in held] for name, held in turns.items()}
    return [
        Row(
            name=each.name,
            num_ranks=each.num_ranks,
            lower_s=_quartile(times_s[each.name], 0),
            median_s=median(times_s[each.name]),
            upper_s=_quartile(times_s[each.name], 2),
            cpu_s=median(turn.cpu_s for turn in turns[each.name]),
            to_single_ratio=_ratio(times_s[each.name], times_s["single"]),
            to_peer_ratio=_ratio(times_s[each.name], times_s[each.peer]) if each.peer else None,
            target_ratio=TARGETS.get(each.name),
        )
        for each in configurations
    ]


def check_losses(turns: Mapping[str, Sequence[Turn]], *, tolerance: float = 1e-4) -> float:
    """The largest relative difference of a loss from the one process's; raises ValueError above ``tolerance``."""
    expected = [loss for turn in turns["single"] for loss in turn.losses]
    worst = 0.0
    for name, held in turns.items():
        losses = [loss for turn in held for loss in turn.losses]
        for step, (loss, wanted) in enumerate(zip(losses, expected, strict=True)):
            difference = abs(loss - wanted) / wanted
            if math.isnan(difference) or difference > tolerance:
                raise ValueError(f"{name}, step {step}: loss {loss}, but {wanted} on one process")
            worst = max(worst, difference)
    return worst


def time_table(held: Sequence[Row]) -> str:
    lines = [
        "| configuration | ranks | s/step (median) | quartiles | CPU s/step, all ranks | time / one process | target | time / peer |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in held:
        lines.append(
            f"| {row.name} | {row.num_ranks} | {row.median_s:.3f} | {row.lower_s:.3f} to {row.upper_s:.3f} | {row.cpu_s:.3f} "
            f"| {row.to_single_ratio:.3f} | {_optional(row.target_ratio, '≤ ')} | {_optional(row.to_peer_ratio)} |"
        )
    return "\n".join(lines)


def phase_table(phases: Mapping[str, Mapping[str, float]]) -> str:
    """Milliseconds a step of rank 0 by phase, under the profiler."""
    lines = [f"| configuration | {' | '.join(PHASES)} | sum |", "|---" * (len(PHASES) + 2) + "|"]
    for name, held in phases.items():
        cells = [f"{held[phase] * 1e3:,.0f}" for phase in PHASES]
        lines.append(f"| {name} | {' | '.join(cells)} | {sum(held.values()) * 1e3:,.0f} |")
    return "\n".join(lines)


def _ratio(times_s: Sequence[float], reference_s: Sequence[float]) -> float:
    return median(a / b for a, b in zip(times_s, reference_s, strict=True))


def _quartile(values: Sequence[float], index: int) -> float:
    return quantiles(values, n=4, method="inclusive")[index] if len(values) > 1 else values[0]


def _optional(value: float | None, prefix: str = "") -> str:
    return "" if value is None else f"{prefix}{value:.2f}"
