"""The short list: the best plans of a search, simulated act by act, of which the fastest is chosen (``--objective simulated``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from shardstage.cli.choosing import Chosen
from shardstage.cli.told import PLAN, Fact, Rows
from shardstage.errors import PlanError
from shardstage.plan import Plan, shorthand
from shardstage.plan.check import require_runnable
from shardstage.units import format_ratio, format_s

if TYPE_CHECKING:
    from shardstage.cluster import Cluster
    from shardstage.cost import Prediction
    from shardstage.graph import ModelGraph

__all__ = [
    "SHORT_LIST",
    "Simulated",
    "fastest",
    "short_list",
    "short_list_choice",
    "short_list_rows",
    "short_list_table",
]

SHORT_LIST: Final = 4
"""Plans that are simulated: seconds each for some devices, a minute and a half for a thousand that gather parameters."""


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """A plan with its price by the formula, and seconds of its step by the simulation of its Program: None where this release does not run
    it."""

    plan: Plan
    prediction: Prediction
    simulated_s: float | None

    @property
    def text(self) -> str:
        return shorthand(self.plan, default_precision=self.plan.precision)

    @property
    def formula_s(self) -> float:
        return self.prediction.step_time_s


def short_list(
    chosen: Chosen,
    graph: ModelGraph,
    machine: Cluster,
    number: int = SHORT_LIST,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[Simulated, ...]:
    """The chosen plan and those that come after it, ``number`` in all, each simulated."""
    plans = list(_plans(chosen, machine))[:number]
    found = []
    for place, (plan, prediction, devices) in enumerate(plans, start=1):
        progress(f"simulating {place} of {len(plans)}: {shorthand(plan)}")
        simulated_s = _simulated_s(plan, graph, devices)
        found.append(Simulated(plan=plan, prediction=prediction, simulated_s=simulated_s))
    return tuple(found)


def fastest(chosen: Chosen, found: Sequence[Simulated]) -> Chosen:
    """With the plan whose simulated step is shortest; the proof stays that of the formula's choice."""
    best = _fastest_of(found)
    plan = replace(best.plan, graph_fingerprint=chosen.plan.graph_fingerprint)
    mixed = chosen.mixed
    if mixed is not None and chosen.mixed_searcher is not None:
        mixed = chosen.mixed_searcher.taking((mixed.priced, *mixed.runners_up)[found.index(best)], mixed)
    return replace(chosen, plan=plan, prediction=best.prediction, mixed=mixed)


def _fastest_of(found: Sequence[Simulated]) -> Simulated:
    """Of those that were simulated; the first where that was not."""
    if found[0].simulated_s is None:
        return found[0]
    ran = [each for each in found if each.simulated_s is not None]
    return min(ran, key=lambda each: each.simulated_s or 0.0)


def _plans(chosen: Chosen, machine: Cluster) -> Iterator[tuple[Plan, Prediction, Cluster]]:
    """With the devices that compute."""
    yield chosen.plan, chosen.prediction, machine if chosen.mixed is None else chosen.mixed.cluster
    for candidate in chosen.found.runners_up if chosen.found else ():
        yield candidate.plan, candidate.prediction, machine
    for priced in chosen.mixed.runners_up if chosen.mixed else ():
        yield priced.plan, priced.prediction, machine.with_parts(priced.choice.arrangement.used)


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


def short_list_rows(found: Sequence[Simulated]) -> Rows:
    """A table, without a row where nothing was simulated."""
    rows = []
    for each in found:
        simulated, apart = "not run", ""
        if each.simulated_s is not None:
            simulated = format_s(each.simulated_s)
            apart = format_ratio(each.simulated_s / each.formula_s - 1)
        rows.append((each.text, format_s(each.formula_s), simulated, apart))
    return Rows("simulated act by act", (PLAN, "formula", "simulated", "apart"), tuple(rows))


def short_list_choice(found: Sequence[Simulated]) -> Iterator[Fact]:
    """A sentence where the simulation chose another plan than the formula."""
    chosen = _fastest_of(found) if found else None
    if chosen is not None and chosen is not found[0]:
        gain = format_ratio(1 - (chosen.simulated_s or 0.0) / (found[0].simulated_s or 1.0))
        text = f"{chosen.text}: {gain} faster, simulated, than what the formula chose"
        yield Fact("chosen", text, is_pasted=True)
