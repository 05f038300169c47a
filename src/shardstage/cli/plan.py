"""``shardstage plan``: chooses or prices a plan, without a device to run it on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from shardstage.cli.choosing import choose_plan, headline, known_model, precision_of
from shardstage.plan import Plan, check, explain, save_plan, shorthand
from shardstage.units import format_bytes, format_ratio, format_s

if TYPE_CHECKING:
    from shardstage.cluster import Cluster
    from shardstage.cost import Prediction
    from shardstage.planner import Candidate

__all__ = ["plan"]

NUM_ALTERNATIVES = 5


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
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float64 (default: bfloat16 on a GPU)")
    ] = None,
    memory: Annotated[str | None, typer.Option(help='What a rank may hold, such as "70GiB"')] = None,
    out: Annotated[Path | None, typer.Option(help="File to write the plan to")] = None,
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

    console = Console(highlight=False)
    num_local = (ranks or num_default_ranks()) if cluster == "local" else 1
    with console.status("looking at the cluster"):
        machine = cluster_named(cluster, ranks=num_local)
    num_ranks = ranks or machine.num_devices
    precision = precision_of(plan, dtype, machine)
    with console.status(f"capturing {model}"):
        known = known_model(model, seq, precision)
        graph = known.graph
    with console.status("pricing plans"):
        chosen, prediction, considered = choose_plan(
            plan, graph, machine, num_ranks, batch, seq, precision, memory
        )
        notes = check(chosen, graph, num_ranks=num_ranks, cluster=machine, max_sequence=known.max_sequence)
    console.print(headline(model, graph, machine, num_ranks))
    console.print(_chosen_table(chosen, prediction))
    if considered:
        console.print(_alternatives_table(considered))
    for note in (*known.notes, *notes, *_memory_note(prediction, machine)):
        console.print(f"[yellow]note[/]  {note}", soft_wrap=True)
    if show:
        console.print(explain(chosen, graph, prediction=prediction), soft_wrap=True, markup=False)
    if out is not None:
        save_plan(chosen, out)
        console.print(f"written to {out}: shardstage train --model {model} --plan {out}", soft_wrap=True)


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
    if needed > there:
        yield f"the plan needs {format_bytes(needed)} a rank, and a {machine.device.name} has {format_bytes(there)}: it will not fit"


def _alternatives_table(considered: tuple[Candidate, ...]) -> Table:
    """The next best, and what would be fastest of those that do not fit."""
    others = considered[1:]
    priced = [c for c in others if c.prediction is not None][:NUM_ALTERNATIVES]
    too_large = [c for c in others if c.prediction is None and c.reason.startswith("needs")][:2]
    table = Table(box=None, pad_edge=False, title=f"{len(considered)} plans considered", title_justify="left")
    table.add_column("alternative", overflow="fold")
    table.add_column("step time", no_wrap=True)
    table.add_column("memory", no_wrap=True)
    table.add_column("why not")
    for candidate in (*priced, *too_large):
        prediction = candidate.prediction
        time = "" if prediction is None else format_s(prediction.step_time_s)
        peak = "" if prediction is None else format_bytes(prediction.peak_bytes)
        table.add_row(candidate.text, time, peak, candidate.reason)
    return table
