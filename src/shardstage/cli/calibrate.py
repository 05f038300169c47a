"""``shardstage calibrate``: corrects the predictions for a machine by runs that were made on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import exp
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from shardstage.cli.wrapping import say
from shardstage.cluster import CAUSES, Calibration, save
from shardstage.cluster.calibration import TENTH_PERCENTILE
from shardstage.errors import ConfigError
from shardstage.units import format_s

if TYPE_CHECKING:  # what imports torch is imported when it is needed: help comes at once
    from shardstage.cost.calibrate import Observation
    from shardstage.training.recorded import RecordedRun

__all__ = ["calibrate"]

LEAST_SHARE = 0.01
"""Of a run's step: a cause with less of it is not named as told by that run."""

STRANGE_RATIO = 3.0
"""Between measured and modelled seconds: factors within [0.5, 2] do not make up for it."""

MEANINGS = {
    "products": "matrix products, attention",
    "memory": "kernels bound by memory, optimizer",
    "host": "launching kernels",
    "tp": "waiting for tp",
    "dp": "waiting for dp",
    "pp": "bubble, transfers between stages",
}


def calibrate(
    runs: Annotated[
        list[Path] | None, typer.Argument(metavar="RUN...", help="Folders of runs made on the machine")
    ] = None,
    cluster: Annotated[
        str, typer.Option(help='The machine: a cluster file, a preset such as "h100:8", or "local"')
    ] = "local",
    out: Annotated[
        Path | None,
        typer.Option(help="File to write (default: the cluster file, else cluster.toml)"),
    ] = None,
) -> None:
    """Correct the predictions for a machine by runs that were made on it.

    Each run's median step, after its warm-up, is held against what the formulas say; six factors, one for each cause of a step's seconds,
    make up for the difference. They go into the cluster file, and every later prediction on it uses them and the interval that they leave.
    Runs of unlike plans tell most: some with dp, some with tp, some with pp.

    [bold]Examples[/]

      shardstage calibrate --cluster laptop.toml runs/*

      shardstage calibrate --cluster h100:8 runs/a runs/b --out ours.toml
    """
    if not runs:
        raise ConfigError(
            "calibrate needs the folder of at least one run", hint="shardstage calibrate runs/20260101-120000"
        )
    from datetime import UTC, datetime

    from shardstage.cli.machine import cluster_named
    from shardstage.cost.calibrate import calibrate as fit
    from shardstage.cost.calibrate import predicted_by_others
    from shardstage.training.recorded import check_same_machine, observations_of

    console = Console(highlight=False, emoji=False)
    recorded = [*_recorded(console, runs)]
    check_same_machine(recorded)
    with console.status("looking at the cluster"):
        machine = cluster_named(cluster, ranks=max(run.plan.mesh.world_size for run in recorded))
    with console.status("pricing the runs"):
        seen = observations_of(recorded, machine)
    found = fit(seen, machine, date=datetime.now(UTC).date().isoformat())
    console.print(_factors(found, seen))
    console.print()
    console.print(_errors(found, seen, predicted_by_others(seen, machine)))
    console.print()
    path = out or _file_of(cluster)
    save(replace(machine, calibration=found), path)
    for note in _notes(found, seen):
        say(console, escape(note))
    console.print(f"written to {path}: shardstage plan --cluster {path}", soft_wrap=True, markup=False)


def _recorded(console: Console, runs: Sequence[Path]) -> Iterator[RecordedRun]:
    """What can be read; short runs and proofs, which ``runs/*`` names too, are left out as long as there are others."""
    from shardstage.training.recorded import TooShortError, read_run

    num_read, refusal = 0, None
    for run in runs:
        try:
            yield read_run(run)
            num_read += 1
        except TooShortError as error:
            refusal = error
            say(console, escape(f"left out   {error.message}"))
    if refusal is not None and not num_read:
        raise refusal


def _factors(found: Calibration, seen: Sequence[Observation]) -> Table:
    table = Table(show_edge=False, pad_edge=False, box=None)
    table.add_column("cause")
    table.add_column("factor", justify="right")
    table.add_column("80 % interval", justify="right")
    table.add_column("from")
    table.add_column("of")
    for cause in CAUSES:
        num_runs = sum(each.parts[cause] >= LEAST_SHARE * each.modelled_s for each in seen)
        low, high = found.interval(cause)
        runs = f"{num_runs} run{'' if num_runs == 1 else 's'}" if num_runs else "no run"
        table.add_row(cause, f"{found.factors[cause]:.2f}", f"{low:.2f} … {high:.2f}", runs, MEANINGS[cause])
    return table


def _errors(found: Calibration, seen: Sequence[Observation], left_out_s: Sequence[float]) -> Table:
    """Predicted over measured, run by run; the last column is what the other runs alone make of each."""
    table = Table(show_edge=False, pad_edge=False, box=None)
    table.add_column("run", overflow="fold")
    for title in ("measured", "before", "after", "by the others"):
        table.add_column(title, justify="right")
    columns = [
        [each.modelled_s / each.measured_s - 1 for each in seen],
        [found.seconds(each.parts) / each.measured_s - 1 for each in seen],
        [predicted_s / each.measured_s - 1 for each, predicted_s in zip(seen, left_out_s, strict=True)],
    ]
    for each, *errors in zip(seen, *columns, strict=True):
        table.add_row(each.name, format_s(each.measured_s), *(f"{100 * error:+.1f} %" for error in errors))
    means = [sum(map(abs, errors)) / len(errors) for errors in columns]
    table.add_row("mean error", "", *(f"{100 * mean:.1f} %" for mean in means), style="bold")
    return table


def _file_of(cluster: str) -> Path:
    return Path(cluster) if Path(cluster).is_file() else Path("cluster.toml")


def _notes(found: Calibration, seen: Sequence[Observation]) -> Iterator[str]:
    """How good predictions are now, and a doubt where the runs and the cluster have little to do with each other."""
    reach = exp(TENTH_PERCENTILE * found.spread)
    yield (
        f"8 of 10 steps like these take {100 * (1 / reach - 1):+.0f} % to {100 * (reach - 1):+.0f} % "
        "of what is predicted now"
    )
    off = median(max(each.measured_s / each.modelled_s, each.modelled_s / each.measured_s) for each in seen)
    if off > STRANGE_RATIO:
        yield (
            f"note: the runs are {off:.0f} times off the formulas, and factors are to correct a few tenths: is the cluster the "
            "machine that they ran on, and was it free? shardstage probe measures it"
        )
