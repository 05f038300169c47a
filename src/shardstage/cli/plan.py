"""``shardstage plan``: chooses or prices a plan, without a device to run it on."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from shardstage.cli.choosing import headline, known_model, precision_of
from shardstage.cli.comparison import as_table, choose, comparison_page, print_comparison
from shardstage.errors import PlanError
from shardstage.plan import Plan, check, explain, save_plan, shorthand
from shardstage.plan.check import require_runnable
from shardstage.units import format_bytes, format_ratio, format_s

if TYPE_CHECKING:
    from shardstage.cluster import Cluster
    from shardstage.cost import Prediction

__all__ = ["plan"]


def plan(
    model: Annotated[
        str, typer.Option(help="Built-in name, Hugging Face config or folder, or module:factory")
    ] = "llama-tiny",
    cluster: Annotated[
        str, typer.Option(help='Preset and size such as "h100:512", a cluster file, or "local"')
    ] = "local",
    ranks: Annotated[int | None, typer.Option(help="Ranks to plan for (default: all of the cluster)")] = None,
    plan: Annotated[
        str, typer.Option(help='"auto", a shorthand such as "dp=2,tp=2", or a plan file to price')
    ] = "auto",
    batch: Annotated[int, typer.Option(help="Samples of a step, over all ranks")] = 16,
    seq: Annotated[int, typer.Option(help="Tokens of a sample")] = 256,
    fix: Annotated[
        str,
        typer.Option(help='What the search may not change: "tp=8,dtype=fp32", "runnable" (by this release)'),
    ] = "",
    memory: Annotated[
        str | None, typer.Option("--max-memory", "--memory", help='What a rank may hold, such as "70GiB"')
    ] = None,
    objective: Annotated[
        str,
        typer.Option(
            help="time, cost (of a step, over fewer devices) or memory (within a quarter of the fastest)"
        ),
    ] = "time",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, for machines")] = False,
    out: Annotated[
        list[Path] | None,
        typer.Option(help="File to write: plan.toml, or a page.html with the front; repeatable"),
    ] = None,
    show: Annotated[
        bool, typer.Option("--explain", help="Say who does what, and what was not shared")
    ] = False,
) -> None:
    """Choose a plan for a model on a cluster, and predict its step time and memory; no weight is allocated.

    [bold]Examples[/]

      shardstage plan --model llama-tiny --cluster local --ranks 4

      shardstage plan --model config.json --cluster h100:512 --batch 1024 --seq 8192 --out plan.toml

      shardstage plan --model gpt2-tiny --cluster a100-80:8 --plan "tp=2,pp=2" --explain
    """
    from shardstage.cli.machine import cluster_named, num_default_ranks

    console = Console(highlight=False, stderr=as_json)  # then standard output is the object alone
    num_local = (ranks or num_default_ranks()) if cluster == "local" else 1
    with console.status("looking at the cluster"):
        machine = cluster_named(cluster, ranks=num_local)
    num_ranks = ranks or machine.num_devices
    asked = [part.strip() for part in fix.split(",") if part.strip()]
    fix = ",".join(part for part in asked if part != "runnable")
    precision = precision_of((fix or plan) if plan == "auto" else plan, None, machine)
    with console.status(f"capturing {model}"):
        known = known_model(model, seq, precision)
        graph = known.graph
    with console.status("pricing plans"):
        chosen, comparison = choose(
            plan,
            graph,
            machine,
            num_ranks=num_ranks,
            batch=batch,
            sequence=seq,
            precision=precision,
            memory=memory,
            fix=fix,
            is_runnable="runnable" in asked,
            objective=objective,
        )
        notes = check(
            chosen.plan,
            graph,
            num_ranks=chosen.plan.mesh.world_size,
            cluster=machine,
            max_sequence=known.max_sequence,
        )
    notes = (
        *known.notes,
        *machine.notes,
        *notes,
        *_run_notes(chosen.plan, num_ranks, chosen.prediction, machine),
    )
    if as_json:
        sys.stdout.write(json.dumps(as_table(chosen, comparison, notes), indent=1) + "\n")
    else:
        console.print(headline(model, graph, machine, num_ranks))
        console.print(_chosen_table(chosen.plan, chosen.prediction))
        print_comparison(console, chosen, comparison, machine)
        for note in notes:
            console.print(f"[yellow]note[/]  {note}", soft_wrap=True)
    if show:
        console.print(explain(chosen.plan, graph, prediction=chosen.prediction), soft_wrap=True, markup=False)
    for path in out or ():
        if path.suffix == ".html":
            path.write_text(comparison_page(model, machine, chosen, comparison), encoding="utf-8")
            console.print(f"page written to {path}", soft_wrap=True)
        else:
            save_plan(chosen.plan, path)
            console.print(
                f"written to {path}: shardstage train --model {model} --plan {path}", soft_wrap=True
            )


def _run_notes(plan: Plan, num_ranks: int, prediction: Prediction, machine: Cluster) -> Iterator[str]:
    idle = num_ranks - plan.mesh.world_size
    if idle:
        yield f"{idle} of {num_ranks} ranks stay idle: with them the step would be no faster"
    try:
        require_runnable(plan)
    except PlanError as error:
        yield f"{error.message}: --fix runnable chooses among what runs"
    yield from _memory_note(prediction, machine)


def _chosen_table(plan: Plan, prediction: Prediction) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    for name, text in _chosen_rows(plan, prediction):
        table.add_row(name, text)
    return table


def _chosen_rows(plan: Plan, prediction: Prediction) -> Iterator[tuple[str, str]]:
    low, expected, high = (
        prediction.step_time_low_s,
        prediction.step_time_s,
        prediction.step_time_high_s,
    )
    yield "plan", shorthand(plan)
    yield (
        "batch",
        f"{plan.global_batch} samples in {plan.num_microbatches} microbatches of {plan.microbatch} a data-parallel rank",
    )
    yield "step time", f"{format_s(expected)}   low {format_s(low)}, high {format_s(high)}"
    yield "speed", f"{prediction.tokens_per_s:,.0f} tokens/s, MFU {format_ratio(prediction.mfu)}"
    waits = f"tp {format_s(prediction.exposed_tp_s)}, dp {format_s(prediction.exposed_dp_s)}, pp {format_s(prediction.exposed_pp_s)}"
    yield "waits", f"bubble {format_ratio(prediction.bubble_ratio)}, exposed communication: {waits}"
    fullest = max(range(plan.mesh.pp), key=prediction.rank_peak_bytes)
    parts = ", ".join(
        f"{name} {format_bytes(num_bytes)}" for name, num_bytes in prediction.ranks[fullest].categories()
    )
    where = f" (pp={fullest})" if plan.mesh.pp > 1 else ""
    yield "memory", f"{format_bytes(prediction.peak_bytes)} a rank{where}: {parts}"


def _memory_note(prediction: Prediction, machine: Cluster) -> Iterator[str]:
    needed, there = prediction.peak_bytes, machine.device.memory_bytes
    if needed > there and not machine.is_mixed:
        yield f"the plan needs {format_bytes(needed)} a rank, and a {machine.device.name} has {format_bytes(there)}: it will not fit"
