"""What ``shardstage plan`` shows beside the plan: its proof, what else there was, why not, and time against memory."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from html import escape
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar, get_args

from rich.console import Console
from rich.table import Table

from shardstage.cli.choosing import Chosen, KnownModel, Question, choose_plan, chosen_mixed
from shardstage.cli.wrapping import PlanText, say
from shardstage.errors import PlanError
from shardstage.plan import plan_to_toml, shorthand
from shardstage.units import format_bytes, format_ratio, format_s

if TYPE_CHECKING:
    from shardstage.cluster import Cluster
    from shardstage.cost import Prediction
    from shardstage.layout.mesh import Axis
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
    "comparison_page",
    "objective_named",
    "print_comparison",
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
    """``front`` is by falling memory; ``dollars`` is the price of a step where the devices have one.

    ``modules`` is what naming modules for selective recomputation would bring, where it brings something.
    """

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
    from shardstage.planner import alternatives, front, named_modules

    if objective == "cost" and question.is_open:
        chosen = _cheapest(question, known, machine)
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
        found = _smallest(chosen.searcher.best, chosen.found)
        best = replace(found.best, graph_fingerprint=found.certificate.graph)
        chosen = Chosen(plan=best, prediction=found.prediction, found=found, searcher=chosen.searcher)
    assert chosen.found is not None and chosen.searcher is not None
    comparison = Comparison(
        alternatives=alternatives(chosen.searcher, chosen.found),
        front=front(chosen.searcher, chosen.found),
        modules=named_modules(chosen.searcher, chosen.found),
        dollars=_dollars(chosen, machine),
    )
    readings.keep()
    return chosen, comparison


def _mixed_comparison(searcher: MixedSearcher, found: MixedResult, dollars: float | None) -> Comparison:
    from shardstage.planner import mixed_alternatives

    return Comparison(alternatives=mixed_alternatives(searcher, found), dollars=dollars)


Result = TypeVar("Result", "SearchResult", "MixedResult")


def _smallest_mixed(chosen: Chosen, limits: Sequence[int]) -> Chosen:
    """With as few bytes on the fullest rank of any class."""
    searcher, fastest = chosen.mixed_searcher, chosen.mixed
    assert searcher is not None and fastest is not None
    found = _smallest(
        lambda cap: searcher.best([min(cap, limit) for limit in limits]),
        fastest,
    )
    return chosen_mixed(found, searcher)


def _smallest(best_within: Callable[[int], Result], fastest: Result) -> Result:
    """The plan of least memory within the slack, by halving the memory between what is too little and what is enough."""
    slowest_s = MEMORY_SLACK * fastest.prediction.step_time_s
    best, low, high = fastest, 0, fastest.prediction.peak_bytes
    while high - low > high // MEMORY_STEPS:
        limit = (low + high) // 2
        try:
            found = best_within(limit)
        except PlanError:
            low = limit
            continue
        if found.prediction.step_time_s > slowest_s:
            low = limit
        else:
            best, high = found, found.prediction.peak_bytes
    return best


def _cheapest(question: Question, known: KnownModel, machine: Cluster) -> Chosen:
    """The plan whose step takes fewest device-seconds, over all ranks, half of them, a quarter, …, or half of each class."""
    best: Chosen | None = None
    least, error = math.inf, None
    for fewer in _halves(question.num_ranks, machine):
        try:
            chosen = choose_plan(
                replace(question, num_ranks=fewer.num_devices), known.graph, fewer, known.readings
            )
        except PlanError as raised:
            error = error or raised
            break
        cost = _dollars(chosen, machine) or _device_s(chosen)
        if cost < least:
            best, least = chosen, cost
    if best is None:
        assert error is not None
        raise error
    return best


def _halves(num_ranks: int, machine: Cluster) -> Iterator[Cluster]:
    """A machine with so many devices, with half of them, a quarter, …; of several classes, of each."""
    if not machine.is_mixed:
        while num_ranks:
            yield machine.with_devices(num_ranks)
            num_ranks //= 2
        return
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
        console.print(f"cost       ${comparison.dollars:,.4f} a step at the preset's hourly price")
    if chosen.mixed is not None:
        _print_shares(console, chosen.mixed)
    found = chosen.found or chosen.mixed
    if found is None:
        return
    _print_proof(console, found.certificate)
    runners = [(text, prediction, "") for text, prediction in _runners_up(chosen)[:MOST_SHOWN]]
    _print_table(console, "runners-up", "plan", runners, chosen.prediction)
    whys = [(a.change, a.prediction, a.reason) for a in _shown(comparison.alternatives)]
    _print_table(console, "why not", "change", whys, chosen.prediction)
    if comparison.modules is not None:
        console.print(f"what if    {_what_if(comparison.modules)}", soft_wrap=True)
    if len(comparison.front) > 1:
        points = [(p.text, p.prediction, "") for p in comparison.front]
        _print_table(console, "less memory", "plan", points, chosen.prediction)


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


def _what_if(named: NamedModules) -> str:
    gain, peak = format_ratio(named.gain), format_bytes(named.prediction.peak_bytes)
    return f'{named}: {gain} faster, fits with {peak}: --plan "{named.text}"'


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


def _print_table(
    console: Console,
    title: str,
    what: str,
    rows: Sequence[tuple[str, Prediction | None, str]],
    best: Prediction,
) -> None:
    if not rows:
        return
    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    table.add_column(what, overflow="fold")
    table.add_column("step time", no_wrap=True)
    table.add_column("memory", no_wrap=True)
    table.add_column("why not" if any(reason for *_, reason in rows) else "slower")
    for text, prediction, reason in rows:
        time = "" if prediction is None else format_s(prediction.step_time_s)
        peak = "" if prediction is None else format_bytes(prediction.peak_bytes)
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
        "runners_up": [{"plan": text, **_numbers(found)} for text, found in _runners_up(chosen)],
        "why_not": [
            {"change": a.change, "reason": a.reason, **_numbers(a.prediction)}
            for a in comparison.alternatives
        ],
        "what_if": None
        if comparison.modules is None
        else {"plan": comparison.modules.text, **_numbers(comparison.modules.prediction)},
        "front": [{"plan": p.text, **_numbers(p.prediction)} for p in comparison.front],
        "notes": list(notes),
    }


def _runners_up(chosen: Chosen) -> Sequence[tuple[str, Prediction]]:
    if chosen.mixed is not None:
        return chosen.mixed.runners_up
    return () if chosen.found is None else [(c.text, c.prediction) for c in chosen.found.runners_up]


def _numbers(prediction: Prediction | None) -> dict[str, float | int | None]:
    if prediction is None:
        return {"step_time_s": None, "peak_bytes": None}
    return {"step_time_s": prediction.step_time_s, "peak_bytes": prediction.peak_bytes}


WIDTH: Final = 640
HEIGHT: Final = 300
MARGIN: Final = 60
LABEL_WIDTH: Final = 56
"""Points nearer than this to a labelled one say their figures under the pointer only."""


def comparison_page(model: str, machine: Cluster, chosen: Chosen, comparison: Comparison) -> str:
    """A page that stands alone: the front as a picture, the mesh on the topology, the tables."""
    rows = "".join(
        f"<tr><td>{escape(a.change)}</td><td>{format_s(a.prediction.step_time_s) if a.prediction else ''}</td>"
        f"<td>{format_bytes(a.prediction.peak_bytes) if a.prediction else ''}</td><td>{escape(a.reason)}</td></tr>"
        for a in comparison.alternatives
    )
    what_if = "" if comparison.modules is None else f"<p>What if: {escape(_what_if(comparison.modules))}</p>"
    proof, found = "", chosen.found or chosen.mixed
    if found is not None:
        certificate = found.certificate
        proof = f"Best of {certificate.enumerated:,} plans, gap {format_ratio(certificate.gap)}."
    devices = f"{chosen.plan.mesh.world_size} × {machine.device.name}"
    if chosen.mixed is not None:
        devices = " + ".join(f"{share.num_used} × {share.name}" for share in chosen.mixed.shares)
    front = _front_picture(comparison.front)
    if chosen.mixed is not None:
        front = "<p>A search over several classes of devices keeps no front.</p>"
    why_not = f"<h2>Why not</h2><table><tr><th>change<th>step time<th>memory<th>reason</tr>{rows}</table>"
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Shardstage: {escape(model)}</title>"
        "<style>body{font:15px system-ui,sans-serif;max-width:46rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}"
        "td,th{padding:.2rem .8rem .2rem 0;text-align:left;vertical-align:top}svg{max-width:100%}</style>"
        f"<h1>{escape(model)} on {escape(devices)}</h1>"
        f"<p><b>{escape(shorthand(chosen.plan))}</b></p><p>{format_s(chosen.prediction.step_time_s)} a step, "
        f"{format_bytes(chosen.prediction.peak_bytes)} a rank. {proof}</p>"
        f"<h2>Time against memory</h2>{front}"
        f"<h2>The mesh on the machine</h2>{_mesh_picture(machine, chosen)}"
        f"{why_not if rows else ''}{what_if}</html>\n"
    )


def _front_picture(points: Sequence[Point]) -> str:
    """Peak memory to the right, step time upwards."""
    if not points:
        return "<p>The plan was given, not searched.</p>"
    most_b = max(p.prediction.peak_bytes for p in points) * 1.1
    most_s = max(p.prediction.step_time_s for p in points) * 1.15

    def at(point: Point) -> tuple[float, float]:
        x = MARGIN + (WIDTH - 2 * MARGIN) * point.prediction.peak_bytes / most_b
        return x, HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * point.prediction.step_time_s / most_s

    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(at, points))
    dots, labelled = "", math.inf
    for point, (x, y) in ((point, at(point)) for point in points):  # by falling memory: from right to left
        seconds, size = format_s(point.prediction.step_time_s), format_bytes(point.prediction.peak_bytes)
        dots += f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#2563eb"><title>{escape(point.text)}: {seconds}, {size}</title></circle>'
        if labelled - x > LABEL_WIDTH:
            labelled = x
            dots += f'<text x="{x:.1f}" y="{y - 9:.1f}" font-size="11" text-anchor="middle">{seconds}</text>'
            dots += f'<text x="{x:.1f}" y="{HEIGHT - MARGIN + 16}" font-size="11" text-anchor="middle">{size}</text>'
    base = HEIGHT - MARGIN
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="step time against peak memory">'
        f'<path d="M{MARGIN} {MARGIN / 2}V{base}H{WIDTH - MARGIN / 2}" fill="none" stroke="#888"/>'
        f'<polyline points="{line}" fill="none" stroke="#2563eb"/>{dots}'
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 12}" font-size="12" text-anchor="middle">peak memory of a rank</text>'
        f'<text x="14" y="{HEIGHT / 2}" font-size="12" transform="rotate(-90 14 {HEIGHT / 2})" text-anchor="middle">'
        "step time</text></svg>"
    )


COLOURS: Final = ("#bfdbfe", "#fde68a", "#bbf7d0", "#fecaca", "#ddd6fe", "#fed7aa", "#a5f3fc", "#e5e7eb")
CELL: Final = 34
MOST_NODES: Final = 8


def _mesh_picture(machine: Cluster, chosen: Chosen) -> str:
    """The first nodes, a box for each rank: coloured by pipeline rank, named by its coordinates."""
    mesh = chosen.plan.mesh
    axes: dict[Axis, str] = {
        "pp": "pipeline rank (colour)",
        "dp": "data-parallel rank",
        "tp": "tensor-parallel rank",
    }
    if mesh.cp > 1:
        axes["cp"] = "context-parallel rank"
    node = machine.devices_per(machine.levels[0])
    num_nodes = min(MOST_NODES, -(-mesh.world_size // node))
    cells = []
    for rank in range(min(mesh.world_size, num_nodes * node)):
        row, column = divmod(rank, node)
        pp = mesh.coordinate(rank, "pp")
        name = " ".join(f"{axis[0]}{mesh.coordinate(rank, axis)}" for axis in axes)
        x, y = 70 + column * (2 * CELL + 4), 20 + row * (CELL + 6)
        cells.append(
            f'<rect x="{x}" y="{y}" width="{2 * CELL}" height="{CELL}" rx="4" fill="{COLOURS[pp % len(COLOURS)]}"/>'
            f'<text x="{x + CELL}" y="{y + 21}" font-size="10" text-anchor="middle">{name}</text>'
        )
    names = "".join(
        f'<text x="4" y="{41 + n * (CELL + 6)}" font-size="11">{escape(machine.levels[0].name)} {n}</text>'
        for n in range(num_nodes)
    )
    left = mesh.world_size - num_nodes * node
    more = f"<p>… and {left:,} more ranks.</p>" if left > 0 else ""
    width, height = 80 + node * (2 * CELL + 4), 30 + num_nodes * (CELL + 6)
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="ranks on nodes">{names}{"".join(cells)}</svg>'
        f"<p>{', '.join(f'{axis[0]}: {what}' for axis, what in axes.items())}.</p>{more}"
    )
