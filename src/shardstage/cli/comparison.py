"""What ``shardstage plan`` finds beside the plan: what else there was, why not, and time against memory; and all of it for machines."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar, get_args

from shardstage.cli.choosing import Chosen, KnownModel, Question, choose_plan, chosen_mixed
from shardstage.errors import PlanError
from shardstage.plan import plan_to_toml, shorthand

if TYPE_CHECKING:
    from shardstage.cluster import Cluster
    from shardstage.cost import Prediction
    from shardstage.planner import (
        Alternative,
        MixedResult,
        MixedSearcher,
        NamedModules,
        Point,
        Saving,
        SearchResult,
    )

__all__ = [
    "Comparison",
    "Objective",
    "as_table",
    "choose",
    "objective_named",
]

Objective = Literal["time", "cost", "memory", "simulated"]

MEMORY_SLACK: Final = 1.25
"""With the objective memory a plan may take a quarter longer than the fastest."""

MEMORY_STEPS: Final = 64
"""The least memory is found to one part in so many."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """``runners_up`` are of other meshes, ``front`` is by falling memory; ``dollars`` is the price of a step where the devices have one.

    ``modules`` is what naming modules for selective recomputation would bring, where it brings something; ``savings`` what savers would
    that the plan does without, whether they bring something or not. ``fastest`` is the price of the fastest plan where another one was
    chosen for its memory.
    """

    runners_up: tuple[tuple[str, Prediction], ...] = ()
    alternatives: tuple[Alternative, ...] = ()
    front: tuple[Point, ...] = ()
    modules: NamedModules | None = None
    savings: tuple[Saving, ...] = ()
    fastest: Prediction | None = None
    dollars: float | None = None


def objective_named(name: str) -> Objective:
    """``PlanError`` for an objective that is none."""
    known: tuple[Objective, ...] = get_args(Objective)
    for objective in known:
        if name == objective:
            return objective
    raise PlanError(f"objective {name!r} is not one of {', '.join(known)}", hint="--objective time")


def choose(
    question: Question, known: KnownModel, machine: Cluster, objective: Objective
) -> tuple[Chosen, Comparison]:
    """The plan by the objective, and what it is compared with; what was read of the model for that is kept."""
    graph, readings = known.graph, known.readings
    from shardstage.planner import (
        alternatives,
        best_in_whole_blocks,
        best_of_other_meshes,
        front,
        more_savers,
        named_modules,
    )

    if objective == "cost" and question.is_open:
        chosen = _cheapest(question, known, machine)
        machine = chosen.alone or machine
    else:
        chosen = choose_plan(question, graph, machine, readings)
    fastest = chosen.prediction if objective == "memory" and question.is_open else None
    if chosen.mixed is not None and objective == "memory":
        chosen = _smallest_mixed(chosen, question.limits(machine))
    if chosen.mixed is not None and chosen.mixed_searcher is not None:
        comparison = _mixed_comparison(chosen.mixed_searcher, chosen.mixed, _dollars(chosen, machine))
        readings.keep()
        return chosen, replace(comparison, fastest=fastest)
    if chosen.found is None or chosen.searcher is None:
        readings.keep()
        return chosen, Comparison(dollars=_dollars(chosen, machine))
    if objective == "memory":
        searcher = chosen.searcher
        found = _smallest(
            lambda cap: best_in_whole_blocks(searcher, int(cap)),
            chosen.found,
            lambda each: each.prediction.peak_bytes,
        )
        best = replace(found.best, graph_fingerprint=found.certificate.graph)
        chosen = Chosen(plan=best, prediction=found.prediction, found=found, searcher=searcher)
    assert chosen.found is not None and chosen.searcher is not None
    comparison = Comparison(
        runners_up=tuple(
            (each.text, each.prediction) for each in best_of_other_meshes(chosen.searcher, chosen.found)
        ),
        alternatives=alternatives(chosen.searcher, chosen.found),
        front=front(chosen.searcher, chosen.found),
        modules=named_modules(chosen.searcher, chosen.found),
        savings=more_savers(chosen.searcher, chosen.found),
        fastest=fastest,
        dollars=_dollars(chosen, machine),
    )
    readings.keep()
    return chosen, comparison


def _mixed_comparison(searcher: MixedSearcher, found: MixedResult, dollars: float | None) -> Comparison:
    from shardstage.planner import mixed_alternatives, mixed_front, mixed_more_savers, mixed_named_modules

    return Comparison(
        runners_up=tuple(
            (shorthand(each.plan, default_precision=each.plan.precision), each.prediction)
            for each in found.runners_up
        ),
        alternatives=mixed_alternatives(searcher, found),
        front=mixed_front(searcher, found),
        modules=mixed_named_modules(searcher, found),
        savings=mixed_more_savers(searcher, found),
        dollars=dollars,
    )


Result = TypeVar("Result", "SearchResult", "MixedResult")


def _smallest_mixed(chosen: Chosen, limits: Sequence[int]) -> Chosen:
    """With as small a share as can be of what the fullest device can hold."""
    searcher, fastest = chosen.mixed_searcher, chosen.mixed
    assert searcher is not None and fastest is not None
    capacities = searcher.capacities

    def best_within(share: float) -> MixedResult:
        return searcher.best([*map(min, (math.ceil(share * capacity) for capacity in capacities), limits)])

    found = _smallest(best_within, fastest, lambda each: each.priced.fill_ratio(capacities))
    return chosen_mixed(found, searcher)


def _smallest(
    best_within: Callable[[float], Result], fastest: Result, held: Callable[[Result], float]
) -> Result:
    """The plan of least memory within the slack, by halving the memory between what is too little and what is enough."""
    slowest_s = MEMORY_SLACK * fastest.prediction.step_time_s
    best, low, high = fastest, 0.0, held(fastest)
    while high - low > high / MEMORY_STEPS:
        limit = (low + high) / 2
        try:
            found = best_within(limit)
        except PlanError:
            low = limit
            continue
        if found.prediction.step_time_s > slowest_s:
            low = limit
        else:
            best, high = found, held(found)
    return best


def _cheapest(question: Question, known: KnownModel, machine: Cluster) -> Chosen:
    """The plan whose step costs least, or takes fewest device-seconds where the price of any device is not known."""
    best: Chosen | None = None
    least, error = math.inf, None
    is_free = not question.fixed.names and not question.fixed.is_runnable
    for cheaper in _fewer(question.num_ranks, machine):
        for fewer in cheaper:
            try:
                asked = replace(question, num_ranks=fewer.num_devices)
                chosen = choose_plan(asked, known.graph, fewer, known.readings)
            except PlanError as raised:
                error = error or raised
                if is_free:  # what is too large for so many is so for fewer
                    break
                continue
            if machine.is_mixed and not fewer.is_mixed:
                chosen = replace(chosen, alone=fewer)
            dollars = None if machine.price_per_hour is None else _dollars(chosen, fewer)
            cost = _device_s(chosen) if dollars is None else dollars
            if cost < least:
                best, least = chosen, cost
    if best is None:
        assert error is not None
        raise error
    return best


def _fewer(num_ranks: int, machine: Cluster) -> Iterator[Iterator[Cluster]]:
    """A machine with all its devices and with ever fewer; of several classes with as many of each, and each class alone."""
    if not machine.is_mixed:
        yield map(machine.with_devices, _numbers_of_devices(num_ranks))
        return
    yield _halves_of_each(machine)
    for number, part in enumerate(machine.parts):
        yield map(machine.part(number).with_devices, _numbers_of_devices(part.num_devices))


def _numbers_of_devices(most: int) -> list[int]:
    """All, half of them, a quarter, …, and every power of two: 12, 8, 6, 4, 3, 2, 1."""
    powers = range(most.bit_length())
    return sorted({most >> power for power in powers} | {1 << power for power in powers}, reverse=True)


def _halves_of_each(machine: Cluster) -> Iterator[Cluster]:
    counts = [part.num_devices for part in machine.parts]
    while all(counts):
        yield machine.with_parts(counts)
        counts = [count // 2 for count in counts]


def _device_s(chosen: Chosen) -> float:
    return chosen.plan.mesh.world_size * chosen.prediction.step_time_s


def _dollars(chosen: Chosen, machine: Cluster) -> float | None:
    if chosen.mixed is not None:
        all_price = chosen.mixed.cluster.price_per_hour
        return None if all_price is None else all_price * chosen.prediction.step_time_s / 3600
    price = machine.device.price_per_hour
    return None if price is None or machine.is_mixed else price * _device_s(chosen) / 3600


def as_table(chosen: Chosen, comparison: Comparison, notes: Sequence[str]) -> dict[str, Any]:
    """Everything as one JSON object; seconds and bytes are numbers."""
    prediction, plan = chosen.prediction, chosen.plan
    proof = next((each.certificate for each in (chosen.found, chosen.mixed) if each is not None), None)
    return {
        "plan": shorthand(plan),
        "plan_file": plan_to_toml(plan),
        "ranks": plan.mesh.world_size,
        **_numbers(prediction),
        "step_time_low_s": prediction.step_time_low_s,
        "step_time_high_s": prediction.step_time_high_s,
        "parts_s": dict(prediction.parts),
        "tokens_per_s": prediction.tokens_per_s,
        "mfu": prediction.mfu,
        "bubble_ratio": prediction.bubble_ratio,
        "rank_peak_bytes": [prediction.rank_peak_bytes(pp) for pp in range(plan.mesh.pp)],
        "dollars": comparison.dollars,
        "certificate": None if proof is None else proof.to_dict(),
        "classes": [] if chosen.mixed is None else [asdict(share) for share in chosen.mixed.shares],
        "runners_up": [{"plan": text, **_numbers(found)} for text, found in comparison.runners_up],
        "why_not": [
            {"change": a.change, "reason": a.reason, **_numbers(a.prediction)}
            for a in comparison.alternatives
        ],
        "what_if": None
        if comparison.modules is None
        else {"plan": comparison.modules.text, **_numbers(comparison.modules.prediction)},
        "fastest": None if comparison.fastest is None else _numbers(comparison.fastest),
        "savings": [
            {"savers": str(s.savers), "plan": s.plan or None, **_numbers(s.prediction)}
            for s in comparison.savings
        ],
        "front": [
            {
                "plan": p.text,
                **_numbers(p.prediction),
                "class_peak_bytes": p.class_peaks,
                "fill_ratio": p.fill_ratio,
            }
            for p in comparison.front
        ],
        "notes": list(notes),
    }


def _numbers(prediction: Prediction | None) -> dict[str, float | int | None]:
    if prediction is None:
        return {"step_time_s": None, "peak_bytes": None}
    return {"step_time_s": prediction.step_time_s, "peak_bytes": prediction.peak_bytes}
