"""The short list: the best plans of a search, simulated act by act, beside what the formula says of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from shardstage.cli.choosing import Chosen
from shardstage.errors import PlanError
from shardstage.plan import Plan, shorthand
from shardstage.plan.check import require_runnable
from shardstage.units import format_ratio, format_s

if TYPE_CHECKING:
    from shardstage.cluster import Cluster
    from shardstage.graph import ModelGraph

__all__ = ["Simulated", "print_short_list", "short_list", "short_list_table"]


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """A plan with the seconds of its step by the formula, and by the simulation of its Program: None where this release does not run it."""

    text: str
    formula_s: float
    simulated_s: float | None


def short_list(
    chosen: Chosen,
    graph: ModelGraph,
    machine: Cluster,
    number: int,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[Simulated, ...]:
    """The chosen plan and those that come after it, ``number`` in all, each simulated.

    Raises ``PlanError`` for a cluster of several classes, which the simulator does not know.
    """
    if number and machine.is_mixed:
        raise PlanError(
            "--simulate: programs are simulated on devices of one class, and this cluster has several",
            hint="leave out --simulate",
        )
    plans = list(_plans(chosen))[:number]
    found = []
    for place, (plan, formula_s) in enumerate(plans, start=1):
        text = shorthand(plan, default_precision=chosen.plan.precision)
        progress(f"simulating {place} of {len(plans)}: {text}")
        found.append(
            Simulated(text=text, formula_s=formula_s, simulated_s=_simulated_s(plan, graph, machine))
        )
    return tuple(found)


def _plans(chosen: Chosen) -> Iterator[tuple[Plan, float]]:
    yield chosen.plan, chosen.prediction.step_time_s
    for candidate in chosen.found.runners_up if chosen.found else ():
        yield candidate.plan, candidate.prediction.step_time_s


def _simulated_s(plan: Plan, graph: ModelGraph, machine: Cluster) -> float | None:
    from shardstage.program import lower
    from shardstage.simulator import planned_prices, step_time

    try:
        require_runnable(plan)
    except PlanError:
        return None
    return step_time(lower(graph, plan), planned_prices(graph, plan, machine))


def short_list_table(found: Sequence[Simulated]) -> list[dict[str, Any]]:
    """For machines: seconds are numbers, or null."""
    return [
        {"plan": each.text, "step_time_s": each.formula_s, "simulated_step_time_s": each.simulated_s}
        for each in found
    ]


def print_short_list(console: Console, found: Sequence[Simulated]) -> None:
    """A table, and a sentence where the simulation would have chosen another."""
    if not found:
        return
    table = Table(box=None, pad_edge=False, title="simulated act by act", title_justify="left")
    table.add_column("plan", overflow="fold", ratio=1)
    for name in ("formula", "simulated", "apart"):
        table.add_column(name, no_wrap=True)
    for each in found:
        simulated, apart = "not run", ""
        if each.simulated_s is not None:
            simulated = format_s(each.simulated_s)
            apart = format_ratio(each.simulated_s / each.formula_s - 1)
        table.add_row(each.text, format_s(each.formula_s), simulated, apart)
    console.print(table)
    ran = {each.text: each.simulated_s for each in found if each.simulated_s is not None}
    fastest = min(ran, key=ran.__getitem__, default=found[0].text)
    if fastest != found[0].text and found[0].text in ran:
        gain = format_ratio(1 - ran[fastest] / ran[found[0].text])
        console.print(f'simulated, another is {gain} faster: --plan "{fastest}"', soft_wrap=True)
