"""What came out: tables of the plans of a model on a network, and of all of them."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

from plans import Candidate
from scipy.stats import spearmanr

__all__ = ["Measured", "Outcome", "plan_table", "summary_table"]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A plan: ``measured_s`` is the median of ``num_steps`` steps, ``cpu_s`` that of the CPU seconds of all ranks together."""

    text: str
    predicted_s: float
    measured_s: float
    cpu_s: float
    num_steps: int
    is_pick: bool


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The plans of one model on one network, fastest first as they were measured."""

    model: str
    gigabits_per_s: float
    plans: tuple[Measured, ...]

    @staticmethod
    def of(model: str, gigabits_per_s: float, plans: Sequence[Candidate], rows: Path) -> Outcome:
        """From the lines of JSON that the ranks wrote."""
        steps: dict[int, list[float]] = defaultdict(list)
        cpu: dict[int, list[float]] = defaultdict(list)
        for line in rows.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if "seconds" in row:
                steps[row["plan"]].append(row["seconds"])
                cpu[row["plan"]].append(row["cpu_s"])
        measured = [
            Measured(
                text=plan.text,
                predicted_s=plan.predicted_s,
                measured_s=median(steps[index]),
                cpu_s=median(cpu[index]),
                num_steps=len(steps[index]),
                is_pick=plan.is_pick,
            )
            for index, plan in enumerate(plans)
        ]
        ordered = tuple(sorted(measured, key=lambda plan: plan.measured_s))
        return Outcome(model=model, gigabits_per_s=gigabits_per_s, plans=ordered)

    @property
    def pick(self) -> Measured:
        return next(plan for plan in self.plans if plan.is_pick)

    @property
    def best(self) -> Measured:
        return self.plans[0]

    @property
    def excess(self) -> float:
        return self.pick.measured_s / self.best.measured_s - 1

    @property
    def pick_rank(self) -> int:
        """1 where the pick is the best."""
        return 1 + self.plans.index(self.pick)

    @property
    def spearman(self) -> float:
        predicted = [plan.predicted_s for plan in self.plans]
        return float(spearmanr(predicted, [plan.measured_s for plan in self.plans]).statistic)


def plan_table(outcome: Outcome) -> str:
    """Every plan, fastest first."""
    lines = [
        "| plan | measured | CPU seconds of a core | predicted | error | steps |",
        "|---|---|---|---|---|---|",
    ]
    num_cores = os.cpu_count() or 1
    for plan in outcome.plans:
        name = f"**`{plan.text}`** (pick)" if plan.is_pick else f"`{plan.text}`"
        error = plan.predicted_s / plan.measured_s - 1
        lines.append(
            f"| {name} | {plan.measured_s * 1e3:.0f} ms | {plan.cpu_s / num_cores * 1e3:.0f} ms "
            f"| {plan.predicted_s * 1e3:.0f} ms | {error:+.0%} | {plan.num_steps} |"
        )
    return "\n".join(lines)


def summary_table(outcomes: Sequence[Outcome]) -> str:
    """One line for each model and network, then the mean and the largest excess."""
    lines = [
        "| model | Gbit/s | plans | pick | its time | best measured | its time | excess | rank | Spearman |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for each in outcomes:
        lines.append(
            f"| {each.model} | {each.gigabits_per_s:g} | {len(each.plans)} "
            f"| `{each.pick.text}` | {each.pick.measured_s * 1e3:.0f} ms "
            f"| `{each.best.text}` | {each.best.measured_s * 1e3:.0f} ms "
            f"| {each.excess:.1%} | {each.pick_rank} | {each.spearman:.2f} |"
        )
    excesses = [each.excess for each in outcomes]
    lines.append(f"\nexcess of the pick: mean {mean(excesses):.1%}, largest {max(excesses):.1%}")
    return "\n".join(lines)
