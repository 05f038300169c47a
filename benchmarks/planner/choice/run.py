"""Chooses among measured plans by predicted time: how much longer the pick takes than the best, and how well the order agrees.

Usage: python benchmarks/planner/choice/run.py [--groups]

A group holds the runs of one model, batch and number of GPUs; its plans differ in mesh, microbatch, recomputation and kernels. The rule
of thumb beside it is Narayanan et al. 2021's: as little model parallelism as was run, of that as much within the node as there is (tp
before pp, takeaway 1), no recomputation, the largest microbatch.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "vtrain"))

from published import DATA, Job, is_ours, job_of, measured_s, predict, rows
from runs import Factors, fitted, is_held_out, predicted_s, read_runs
from scipy.stats import spearmanr

MIN_PLANS = 3
DRAWS = 200


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One plan of a group; ``rule`` sorts plans as the rule of thumb does, the first is its pick."""

    group: tuple[Any, ...]
    measured_s: float
    predicted_s: float
    rule: tuple[float, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--groups", action="store_true", help="print every group")
    arguments = parser.parse_args()
    if not DATA.exists():
        print("skipped: there is no ../shared/data beside the project")
        return
    print(
        "| runs | groups | plans | excess of the pick | largest | Spearman, mean | Spearman of all | of an exact model "
        "| rule of thumb |\n|---|---|---|---|---|---|---|---|---|"
    )
    sets: dict[str, Callable[[], Iterable[Choice]]] = {
        "Hagemann": lambda: _published("hagemann"),
        "BLOOM": lambda: _published("bloom-prequel"),
        "vTrain, held-out models, presets": lambda: _vtrain(is_fitted=False),
        "vTrain, held-out models, six factors": lambda: _vtrain(is_fitted=True),
    }
    for name, read in sets.items():
        choices = list(read())
        groups = _grouped(choices)
        noise = _noise(choices)
        exact = f"{_exact_order(groups, noise):.3f}" if noise else "not known"
        _print(name, groups, exact, prints_groups=arguments.groups)


def _print(
    name: str, groups: dict[tuple[Any, ...], list[Choice]], exact: str, *, prints_groups: bool
) -> None:
    excess = {key: _excess(plans, lambda plan: plan.predicted_s) for key, plans in groups.items()}
    by_rule = [_excess(plans, lambda plan: plan.rule) for plans in groups.values()]
    orders = {key: _order(plans) for key, plans in groups.items()}
    everything = [plan for plans in groups.values() for plan in plans]
    if prints_groups:
        for key, plans in groups.items():
            print(f"  {key} {len(plans)} plans: excess {100 * excess[key]:.1f} %, Spearman {orders[key]:.3f}")
    print(
        f"| {name} | {len(groups)} | {len(everything)} | {100 * statistics.mean(excess.values()):.1f} % "
        f"| {100 * max(excess.values()):.1f} % | {statistics.mean(orders.values()):.3f} | {_order(everything):.3f} "
        f"| {exact} | {100 * statistics.mean(by_rule):.1f} % |"
    )


def _excess(plans: list[Choice], key: Callable[[Choice], Any]) -> float:
    """Seconds of the first plan by ``key`` over those of the best, less one; of plans that are equally good, their mean."""
    first = min(map(key, plans))
    picked = statistics.mean(plan.measured_s for plan in plans if key(plan) == first)
    return picked / min(plan.measured_s for plan in plans) - 1


def _order(plans: list[Choice]) -> float:
    return float(spearmanr([p.predicted_s for p in plans], [p.measured_s for p in plans]).statistic)


def _noise(choices: list[Choice]) -> float:
    """The standard deviation of the logarithm of a plan's time, of plans that were run several times; 0 where none was.

    Runs of the same time to the last digit are one run that its source prints twice.
    """
    times: dict[tuple[Any, ...], set[float]] = defaultdict(set)
    for choice in choices:
        times[(choice.group, choice.predicted_s, choice.rule)].add(math.log(choice.measured_s))
    squares = [sum((t - statistics.mean(same)) ** 2 for t in same) for same in times.values()]
    freedom = sum(len(same) - 1 for same in times.values())
    return math.sqrt(sum(squares) / freedom) if freedom else 0.0


def _exact_order(groups: dict[tuple[Any, ...], list[Choice]], noise: float) -> float:
    """Spearman's mean over groups between times as they are and as they would come out of another run, over many draws.

    Measured times, which are noisy themselves, stand for the true ones; these lie nearer to each other, so it comes out too high.
    """
    random = Random(0)
    orders = (
        spearmanr(times, [t * random.lognormvariate(0.0, noise) for t in times]).statistic
        for _ in range(DRAWS)
        for times in ([plan.measured_s for plan in plans] for plans in groups.values())
    )
    return float(statistics.mean(orders))


def _grouped(choices: Iterable[Choice]) -> dict[tuple[Any, ...], list[Choice]]:
    """Groups of enough plans to choose from; a plan that was run several times counts once, with the mean of its times."""
    times: dict[tuple[Any, ...], list[Choice]] = defaultdict(list)
    for choice in choices:
        times[(choice.group, choice.predicted_s, choice.rule)].append(choice)
    groups: dict[tuple[Any, ...], list[Choice]] = defaultdict(list)
    for (group, predicted, rule), same in times.items():
        seconds = statistics.mean(choice.measured_s for choice in same)
        groups[group].append(Choice(group=group, measured_s=seconds, predicted_s=predicted, rule=rule))
    return {group: plans for group, plans in groups.items() if len(plans) >= MIN_PLANS}


def _published(group: str) -> Iterator[Choice]:
    for row in rows():
        if row["group"].startswith(group) and is_ours(row):
            job = job_of(row)
            yield Choice(
                group=_group_of(job),
                measured_s=measured_s(row),
                predicted_s=predict(job).step_time_s,
                rule=_rule(job),
            )


def _vtrain(*, is_fitted: bool) -> Iterator[Choice]:
    runs = read_runs()
    held_out = [run for run in runs if is_held_out(run)]
    factors = fitted([run for run in runs if not is_held_out(run)]) if is_fitted else Factors()
    for run, seconds in zip(held_out, predicted_s(held_out, factors), strict=True):
        yield Choice(
            group=_group_of(run.job),
            measured_s=run.measured_s,
            predicted_s=float(seconds),
            rule=_rule(run.job),
        )


def _group_of(job: Job) -> tuple[Any, ...]:
    shape = job.shape
    return (shape.layers, shape.hidden, job.sequence, job.global_batch, job.mesh.world_size)


def _rule(job: Job) -> tuple[float, ...]:
    mesh = job.mesh
    return (mesh.tp * mesh.pp, mesh.pp, job.recompute == "full", -job.microbatch)


if __name__ == "__main__":
    main()
