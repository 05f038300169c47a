"""``shardstage plan``: chooses or prices a plan, without a device to run it on."""

from __future__ import annotations

import gc
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from shardstage.cli import options
from shardstage.cli.answer import Answer
from shardstage.cli.choosing import (
    Chosen,
    KnownModel,
    Question,
    asked_samples,
    choose_plan,
    headline,
    known_model,
    precision_of,
)
from shardstage.cli.comparison import (
    Objective,
    as_table,
    choose,
    objective_named,
)
from shardstage.cli.fixing import parse_fixed
from shardstage.cli.outputs import require_endings, write_text
from shardstage.cli.plan_page import answer_page
from shardstage.cli.saving import searched_savings
from shardstage.cli.short_list import Simulated, fastest, short_list, short_list_table
from shardstage.cli.told import PLAN, Fact, print_fact, print_rows
from shardstage.cli.waiting import capturing
from shardstage.cli.wrapping import PlanText, say
from shardstage.errors import PlanError
from shardstage.graph.cache import is_cacheable
from shardstage.plan import check, explain, save_plan
from shardstage.plan.check import require_runnable
from shardstage.runtime.c_allocator import keep_freed_memory
from shardstage.units import format_bytes, format_ratio, format_s, parse_bytes

if TYPE_CHECKING:
    from shardstage.cluster import Cluster
    from shardstage.cost import Prediction
    from shardstage.graph import ModelGraph

__all__ = ["plan", "print_answer"]

COLLECTED_OBJECTS: Final = 100_000
"""New objects after which Python looks for cycles among them. Its own number, 700, takes a tenth of a search's time, as nearly all of them
are kept and none is part of a cycle."""

WORTH_TELLING: Final = 0.01
"""Of a price: by less, what a search says and what the plan costs by itself may differ without a word."""

UNPRICED: Final = (
    "no price is known for an hour of these devices: the cheapest step is that of the fewest device-seconds"
)

DEFAULT_BATCH: Final = 16
DEFAULT_SEQUENCE: Final = 256

ENDINGS: Final = MappingProxyType({".toml": "the plan", ".html": "a page with all of it"})


MaxMemory = Annotated[
    str | None,
    typer.Option("--max-memory", "--memory", help='What a rank may hold: "70GiB", "80%" of what it can'),
]
ObjectiveName = Annotated[
    str,
    typer.Option(
        help="time, cost (of a step), memory (a quarter slower at most), simulated (time, short list)"
    ),
]


def plan(
    model: options.Model = "llama-tiny",
    cluster: options.ClusterName = "local",
    ranks: Annotated[int | None, options.count("Ranks to plan for (default: the cluster's)")] = None,
    plan: options.Plan = "auto",
    batch: Annotated[
        int | None, options.count("Samples of a step, over all ranks (default: a plan file's, else 16)")
    ] = None,
    seq: Annotated[int | None, options.count("Tokens of a sample (default: a plan file's, else 256)")] = None,
    fix: Annotated[
        str,
        typer.Option(help='What the search may not change: "tp=8,dtype=fp32", "runnable" (by this release)'),
    ] = "",
    memory: MaxMemory = None,
    objective: ObjectiveName = "time",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, for machines")] = False,
    out: Annotated[
        list[Path] | None,
        typer.Option(help="File to write: plan.toml, or a page.html with all of it; repeatable"),
    ] = None,
    show: Annotated[
        bool, typer.Option("--explain", help="Say who does what, what was not shared, and what savers bring")
    ] = False,
) -> None:
    """Choose a plan for a model on a cluster, and predict its step time and memory; no weight is allocated.

    With --plan auto all plans are searched, within what --fix keeps, and the proof counts those that were priced and those that a bound
    rules out. A plan that is given is priced alone.

    [bold]Examples[/]

      shardstage plan --model llama-tiny --cluster local --ranks 4

      shardstage plan --model config.json --cluster h100:512 --batch 1024

      shardstage plan --cluster h100:8 --plan "tp=2,pp=2" --explain
    """
    gc.set_threshold(COLLECTED_OBJECTS)
    keep_freed_memory()
    require_endings(out or (), ENDINGS)
    fixed, aim = parse_fixed(fix, plan=plan), objective_named(objective)
    memory_bytes, memory_ratio = (None, 1.0) if memory is None else _some_memory(memory)
    samples, tokens = asked_samples(plan, batch=batch, sequence=seq)
    console = Console(highlight=False, emoji=False, stderr=as_json)  # the object stands alone
    machine = _machine(console, cluster, ranks)
    question = Question(
        plan=plan,
        num_ranks=ranks or machine.num_devices,
        batch=samples or DEFAULT_BATCH,
        sequence=tokens or DEFAULT_SEQUENCE,
        precision=precision_of(plan, fixed.request.precision, machine),
        memory_bytes=memory_bytes,
        memory_ratio=memory_ratio,
        fixed=fixed,
    )
    _require_answerable(question, machine)
    answer = _answer(console, model, machine, question, aim, is_explained=show)
    _show(console, answer, as_json=as_json, out=out or ())


def _some_memory(memory: str) -> tuple[int | None, float]:
    """Bytes that a rank may hold, or None and the share of what its device can hold."""
    share = re.fullmatch(r"(\d+(?:\.\d+)?) ?%", memory)
    if re.fullmatch(r"\d{1,5}(\.\d+)?", memory) and float(memory):
        raise PlanError(
            f"--max-memory {memory}: so many bytes hold no model; a unit is missing",
            hint=f"--max-memory {memory}GiB",
        )
    num_bytes = None if share else parse_bytes(memory)
    ratio = float(share[1]) / 100 if share else 1.0
    if not ratio or num_bytes == 0:
        raise PlanError(
            f"--max-memory {memory}: a rank that may hold nothing runs nothing", hint="--max-memory 70GiB"
        )
    if ratio > 1:
        raise PlanError(
            f"--max-memory {memory}: a rank holds no more than its device can", hint="--max-memory 100%"
        )
    return num_bytes, ratio


def _machine(console: Console, cluster: str, ranks: int | None) -> Cluster:
    from shardstage.cli.machine import cluster_named, num_default_ranks

    num_local = (ranks or num_default_ranks()) if cluster == "local" else 1
    with console.status("looking at the cluster"):
        return cluster_named(cluster, ranks=num_local)


def _require_answerable(question: Question, machine: Cluster) -> None:
    """Refuses what a search over several classes of devices would not heed."""
    if not (machine.is_mixed and question.is_open):
        return
    if question.num_ranks != machine.num_devices:
        raise PlanError(
            f"--ranks {question.num_ranks}: a search over several classes of devices plans for all {machine.num_devices}",
            hint=f"--ranks {machine.num_devices}, or a --cluster of fewer devices",
        )


def _answer(
    console: Console,
    model: str,
    machine: Cluster,
    question: Question,
    objective: Objective,
    *,
    is_explained: bool,
) -> Answer:
    """Captures the model, chooses a plan for it and says what is odd about that."""
    is_kept = is_cacheable(model)
    with capturing(console, model, sequence=question.sequence, is_kept=is_kept):
        known = known_model(model, question.sequence, question.precision)
    with console.status("pricing plans"):
        chosen, comparison = choose(question, known, machine, objective)
        if is_explained and objective in ("time", "simulated"):
            savings = searched_savings(question, known, machine, chosen, comparison.savings)
            comparison = replace(comparison, savings=tuple(savings))
    unpriced = () if objective != "cost" or machine.price_per_hour is not None else (UNPRICED,)
    machine = chosen.alone or machine
    simulated: tuple[Simulated, ...] = ()
    if objective == "simulated":
        with console.status("simulating") as status:
            simulated = short_list(chosen, known.graph, machine, progress=status.update)
        chosen = fastest(chosen, simulated)
    with console.status("checking the plan"):
        notes = check(
            chosen.plan,
            known.graph,
            num_ranks=chosen.plan.mesh.world_size,
            cluster=machine,
            max_sequence=known.max_sequence,
            is_searched=question.is_open,
        )
    run_notes = (
        *(unpriced if question.is_open else ()),
        *_run_notes(chosen, question, machine, objective),
        *_notes_as_run(chosen, question, known.graph, machine, objective),
        *_fewer_note(chosen, question, known, machine),
    )
    explained = explain(chosen.plan, known.graph, prediction=chosen.prediction) if is_explained else ""
    return Answer(
        model=model,
        graph=known.graph,
        machine=machine,
        num_ranks=question.num_ranks if chosen.alone is None else machine.num_devices,
        chosen=chosen,
        comparison=comparison,
        limit_bytes=None if machine.is_mixed else question.limit_bytes(machine),
        notes=(*known.notes, *machine.notes, *notes, *run_notes),
        simulated=simulated,
        explained=explained,
    )


def _show(console: Console, answer: Answer, *, as_json: bool, out: Sequence[Path]) -> None:
    written = [_written(answer, path) for path in out]  # first: whoever reads what is printed may leave
    if as_json:
        table = as_table(answer.chosen, answer.comparison, answer.notes)
        table["simulated"] = short_list_table(answer.simulated)
        sys.stdout.write(json.dumps(table, indent=1) + "\n")
    else:
        print_answer(console, answer)
    if answer.explained:
        console.print(answer.explained, soft_wrap=True, markup=False)
    for said in written:
        console.print(said, soft_wrap=True)


def print_answer(console: Console, answer: Answer) -> None:
    """All of it but who does what, for people."""
    console.print(headline(answer.model, answer.graph, answer.machine, answer.num_ranks))
    console.print(_plan_table(answer.plan_facts()))
    for fact in answer.search_facts():
        print_fact(console, fact)
    for rows in (answer.runners_up(), answer.why_not()):
        print_rows(console, rows)
    for fact in answer.what_ifs():
        print_fact(console, fact)
    for rows in (answer.less_memory(), answer.simulations()):
        print_rows(console, rows)
    for fact in answer.simulated_choice():
        print_fact(console, fact)
    for note in answer.notes:
        say(console, f"[yellow]note[/]  {escape(note)}")


def _plan_table(facts: Iterable[Fact]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for fact in facts:
        table.add_row(fact.name, PlanText(fact.text) if fact.name == PLAN else fact.text)
    return table


def _written(answer: Answer, path: Path) -> str:
    """Writes the page, where the path ends so, else the plan; returns what to say of it."""
    if path.suffix == ".html":
        write_text(path, answer_page(answer))
        return f"page written to {path}"
    plan = answer.chosen.plan
    save_plan(plan, path)
    samples = f"--batch {plan.global_batch}" + ("" if plan.sequence is None else f" --seq {plan.sequence}")
    return (
        f"written to {path}: shardstage train --model {answer.model} --plan {path} "
        f"--ranks {plan.mesh.world_size} {samples}"
    )


def _run_notes(chosen: Chosen, question: Question, machine: Cluster, objective: Objective) -> Iterator[str]:
    if objective in ("cost", "memory") and not question.is_open:
        yield f"--objective {objective} says how to choose, and this plan was given"
    idle = question.num_ranks - chosen.plan.mesh.world_size
    if idle and chosen.mixed is None:  # whose idle devices are named with the shares
        why = "a step would cost more" if objective == "cost" else "the step would be no faster"
        why += f", keeping to --fix {question.fixed.decisions}" if question.fixed.decisions else ""
        whose = (
            ""
            if chosen.alone is None
            else f"; ranks are those of --cluster {chosen.alone.name}:{chosen.alone.num_devices}"
        )
        yield f"{idle} of {question.num_ranks} ranks stay idle: with them {why}{whose}"
    try:
        require_runnable(chosen.plan)
    except PlanError as error:
        yield f"{error.message}: --fix runnable chooses among what runs"
    yield from _memory_notes(chosen.prediction.peak_bytes, question, machine)


def _fewer_note(chosen: Chosen, question: Question, known: KnownModel, machine: Cluster) -> Iterator[str]:
    """What this release runs leaves no rank idle, also where those beyond whole nodes, or beyond a power of two, only hinder."""
    ranks = question.num_ranks
    if not (question.is_open and question.fixed.is_runnable) or machine.is_mixed:
        return
    node = machine.devices_per(machine.levels[0])
    fewer = ranks - ranks % node if ranks > node else 1 << ranks.bit_length() - 1
    if fewer == ranks:
        return
    try:
        other = choose_plan(replace(question, num_ranks=fewer), known.graph, machine, known.readings)
    except PlanError:
        return
    gain = 1 - other.prediction.step_time_s / chosen.prediction.step_time_s
    if gain >= WORTH_TELLING:
        yield f"what this release runs leaves no rank idle: {fewer} of these {ranks} take {format_ratio(gain)} less time: --ranks {fewer}"


def _memory_notes(needed: int, question: Question, machine: Cluster) -> Iterator[str]:
    """Where a plan that was given needs too much, or a search was told of more than a device has, or can use."""
    from shardstage.planner import usable_bytes

    there, allowed, name = machine.device.memory_bytes, question.memory_bytes, machine.device.name
    if question.is_open and allowed is not None and allowed > there and not machine.is_mixed:
        yield f"--max-memory {format_bytes(allowed)} is more than the {format_bytes(there)} of a {name}, which the plan keeps to"
    if question.memory_ratio < 1 and not machine.is_mixed:
        allowed = question.limit_bytes(machine)
    if needed > there and not machine.is_mixed:
        yield f"the plan needs {format_bytes(needed)} a rank, and a {name} has {format_bytes(there)}: it will not fit"
    elif needed > usable_bytes(machine) and not machine.is_mixed:
        yield (
            f"the plan needs {format_bytes(needed)} a rank: of a {name}'s {format_bytes(there)} a step can use about "
            f"{format_bytes(usable_bytes(machine))}, the rest is for CUDA, NCCL and what the allocator cannot use"
        )
    if allowed is not None and needed > allowed:
        yield f"the plan needs {format_bytes(needed)} a rank, more than the {format_bytes(allowed)} of --max-memory"


def _notes_as_run(
    chosen: Chosen, question: Question, graph: ModelGraph, machine: Cluster, objective: Objective
) -> Iterator[str]:
    """What ``--plan`` will say of a plan that was searched in parts of blocks (``planner.pricing.fold_for``), and of it compiled."""
    searcher = chosen.searcher or chosen.mixed_searcher
    if searcher is None:
        return
    from shardstage.planner import is_in_parts, predict

    used, whole = chosen.mixed.cluster if chosen.mixed else machine, chosen.prediction
    if is_in_parts(searcher.pricing.folded, graph):
        whole = predict(graph, chosen.plan, used)
        yield from _parts_note(chosen, whole, question.limit_bytes(machine), objective)
    if "is_compiled" not in question.fixed.names and not chosen.plan.recompute_modules:
        compiled = predict(graph, replace(chosen.plan, is_compiled=True), used)
        gain = 1 - compiled.step_time_s / whole.step_time_s
        if gain >= WORTH_TELLING:
            yield f"compiled by torch.compile, this plan takes {format_ratio(gain)} less time: --fix compile searches with that"


def _parts_note(chosen: Chosen, whole: Prediction, limit: int, objective: Objective) -> Iterator[str]:
    """Where a plan takes or needs another amount in whole blocks.

    The least memory is found by searches within ever less: that a plan's limit was lower says nothing then.
    """
    said, fit = chosen.prediction, ""
    if chosen.found is not None and whole.peak_bytes > limit:
        fit = f", more than the {format_bytes(limit)} it may"
    elif objective != "memory" and chosen.found is not None and chosen.found.limit_bytes < limit:
        fit = f": to fit, it was searched for within {format_bytes(chosen.found.limit_bytes)}"
    ratios = whole.step_time_s / said.step_time_s, whole.peak_bytes / said.peak_bytes
    if fit or any(abs(ratio - 1) >= WORTH_TELLING for ratio in ratios):
        yield (
            "a model of few blocks is searched in parts of them; in whole blocks, as it runs, the plan takes "
            f"{format_s(whole.step_time_s)} and needs {format_bytes(whole.peak_bytes)} a rank{fit}"
        )
