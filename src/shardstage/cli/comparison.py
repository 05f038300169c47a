"""What ``shardstage plan`` shows beside the plan: its proof, what else there was, why not, and time against memory."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar, get_args

from rich.console import Console
from rich.table import Table

from shardstage.cli.choosing import Chosen, KnownModel, Question, choose_plan, chosen_mixed
from shardstage.cli.wrapping import PlanText, say
from shardstage.errors import PlanError
from shardstage.plan import plan_to_toml, shorthand
from shardstage.units import format_bytes, format_dollars, format_ratio, format_s

if TYPE_CHECKING:
    from shardstage.cluster import Cluster
    from shardstage.cost import Prediction
    from shardstage.planner import (
        Alternative,
        Certificate,
        MixedResult,
        MixedSearcher,
        NamedModules,
        Point,
        SearchResult,
    )

__all__ = [
    "Comparison",
    "Objective",
    "as_table",
    "choose",
    "held",
    "held_text",
    "objective_named",
    "print_comparison",
    "share_text",
    "what_if_text",
]

Objective = Literal["time", "cost", "memory", "simulated"]

MEMORY_SLACK: Final = 1.25
"""With the objective memory a plan may take a quarter longer than the fastest."""

MEMORY_STEPS: Final = 64
"""The least memory is found to one part in so many."""

MOST_SHOWN: Final = 6
MOST_UNFIT_SHOWN: Final = 3


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """``runners_up`` are of other meshes, ``front`` is by falling memory; ``dollars`` is the price of a step where the devices have one.

    ``modules`` is what naming modules for selective recomputation would bring, where it brings something.
    """

    runners_up: tuple[tuple[str, Prediction], ...] = ()
    alternatives: tuple[Alternative, ...] = ()
    front: tuple[Point, ...] = ()
    modules: NamedModules | None = None
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
        named_modules,
    )

    if objective == "cost" and question.is_open:
        chosen = _cheapest(question, known, machine)
        machine = chosen.alone or machine
    else:
        chosen = choose_plan(question, graph, machine, readings)
    if chosen.mixed is not None and objective == "memory":
        chosen = _smallest_mixed(chosen, question.limits(machine))
    if chosen.mixed is not None and chosen.mixed_searcher is not None:
        comparison = _mixed_comparison(chosen.mixed_searcher, chosen.mixed, _dollars(chosen, machine))
        readings.keep()
        return chosen, comparison
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
        dollars=_dollars(chosen, machine),
    )
    readings.keep()
    return chosen, comparison


def _mixed_comparison(searcher: MixedSearcher, found: MixedResult, dollars: float | None) -> Comparison:
    from shardstage.planner import mixed_alternatives, mixed_front, mixed_named_modules

    return Comparison(
        runners_up=tuple(
            (shorthand(each.plan, default_precision=each.plan.precision), each.prediction)
            for each in found.runners_up
        ),
        alternatives=mixed_alternatives(searcher, found),
        front=mixed_front(searcher, found),
        modules=mixed_named_modules(searcher, found),
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


def print_comparison(console: Console, chosen: Chosen, comparison: Comparison, machine: Cluster) -> None:
    """The proof in a sentence, then runners-up, why-nots and the front."""
    if comparison.dollars is not None:
        console.print(f"cost       {format_dollars(comparison.dollars)} a step at its devices' hourly price")
    if chosen.mixed is not None:
        _print_shares(console, chosen.mixed)
    found = chosen.found or chosen.mixed
    if found is None:
        return
    _print_proof(console, found.certificate)
    runners = [(text, prediction, "") for text, prediction in comparison.runners_up[:MOST_SHOWN]]
    _print_table(console, "runners-up", "plan", runners, chosen.prediction)
    whys = [(a.change, a.prediction, a.reason) for a in _shown(comparison.alternatives)]
    _print_table(console, "why not", "change", whys, chosen.prediction)
    if comparison.modules is not None:
        console.print(f"what if    {what_if_text(comparison.modules)}", soft_wrap=True)
    if len(comparison.front) > 1:
        _print_front(console, comparison.front, chosen.prediction)


def _shown(alternatives: Sequence[Alternative]) -> list[Alternative]:
    """The cheapest change of each decision, some that do not fit, and of the others the cheapest."""
    firsts: dict[str, Alternative] = {}
    for each in alternatives:
        firsts.setdefault(re.split("[ =]", each.change)[0], each)
    large = [each for each in alternatives if each.prediction is None][:MOST_UNFIT_SHOWN]
    chosen = list(dict.fromkeys((*firsts.values(), *large, *alternatives)))[: 2 * MOST_SHOWN]
    return [each for each in alternatives if each in chosen]


def _print_proof(console: Console, proof: Certificate) -> None:
    say(
        console,
        f"proof      best of {proof.enumerated:,} plans, gap {format_ratio(proof.gap)}: {proof.priced:,} priced, "
        f"{proof.by_bound:,} too slow and {proof.by_memory + proof.unfit:,} too large by their bounds, "
        f"{proof.by_rule:,} no better by rule",
    )
    if proof.needs:
        say(console, f"needed     {proof.necessity()}")


def what_if_text(named: NamedModules) -> str:
    gain, peak = format_ratio(named.gain), format_bytes(named.prediction.peak_bytes)
    return f"{named}: {gain} faster, fits with {peak}: {named.asked}"


def _print_shares(console: Console, found: MixedResult) -> None:
    """Which layers, or how many samples, each class of devices takes, and what it holds; which devices are idle."""
    by_layers = found.priced.choice.arrangement.by == "stages"
    of = sum(share.num_layers if by_layers else share.num_samples for share in found.shares)
    for share in found.shares:
        takes = (
            f"{share.num_layers} of {of} layers" if by_layers else f"{share.num_samples:,} of {of:,} samples"
        )
        held = f"{format_bytes(share.peak_bytes)} of {format_bytes(share.limit_bytes)}"
        say(console, f"share      {share.num_used:,} × {share.name}: {takes}, {held}")
    idle = [f"{s.num_devices - s.num_used:,} × {s.name}" for s in found.shares if s.num_used < s.num_devices]
    if idle:
        say(console, f"idle       {', '.join(idle)}: ranks are those of --cluster {found.cluster.name}")


def _print_front(console: Console, points: Sequence[Point], best: Prediction) -> None:
    title = "less memory"
    if len(points[0].class_peaks) > 1:
        title += ": of what the fullest device can hold, and the fullest of each class"
    rows = [(point.text, point.prediction, "", held_text(point)) for point in points]
    _print_rows(console, title, "plan", rows, best)


def held(point: Point) -> float:
    """What counts as its memory: bytes, or of several classes the share of what the fullest device can hold."""
    return point.prediction.peak_bytes if len(point.class_peaks) == 1 else point.fill_ratio


def held_text(point: Point) -> str:
    peaks = [format_bytes(peak) for peak in point.class_peaks]
    return peaks[0] if len(peaks) == 1 else f"{share_text(point)}: {_in_one_unit(peaks)}"


def share_text(point: Point) -> str:
    """Rounded up, so that a search within it finds the plan."""
    return format_ratio(math.ceil(1000 * point.fill_ratio) / 1000)


def _in_one_unit(amounts: Sequence[str]) -> str:
    """The unit once where all have the same."""
    last = amounts[-1].split()[-1]
    each = [amount.removesuffix(f" {last}") for amount in amounts[:-1]]
    return ", ".join((*each, amounts[-1]) if not any(" " in one for one in each) else amounts)


def _print_table(
    console: Console,
    title: str,
    what: str,
    rows: Sequence[tuple[str, Prediction | None, str]],
    best: Prediction,
) -> None:
    peaks = ("" if found is None else format_bytes(found.peak_bytes) for _, found, _ in rows)
    _print_rows(console, title, what, [(*row, peak) for row, peak in zip(rows, peaks, strict=True)], best)


def _print_rows(
    console: Console,
    title: str,
    what: str,
    rows: Sequence[tuple[str, Prediction | None, str, str]],
    best: Prediction,
) -> None:
    """Of each row its text, price, reason and memory."""
    if not rows:
        return
    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    table.add_column(what, overflow="fold")
    table.add_column("step time", no_wrap=True)
    table.add_column("memory", no_wrap=True)
    table.add_column("why not" if any(reason for _, _, reason, _ in rows) else "slower")
    for text, prediction, reason, peak in rows:
        time = "" if prediction is None else format_s(prediction.step_time_s)
        if not reason and prediction is not None:
            reason = format_ratio(prediction.step_time_s / best.step_time_s - 1)
        table.add_row(PlanText(text) if what == "plan" else text, time, peak, reason)
    console.print(table)


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
