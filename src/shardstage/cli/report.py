"""``shardstage report``: one page on what a run did and what it was expected to do."""

from __future__ import annotations

import json
import re
import webbrowser
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shardstage.cli.outputs import write_text
from shardstage.errors import ConfigError

if TYPE_CHECKING:  # what is slow to import is imported when it is needed: help comes at once
    from shardstage.plan import Plan
    from shardstage.report import About, RankNote
    from shardstage.timeline import Timeline
    from shardstage.training.folder import RunFolder

__all__ = ["report"]


def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run, such as runs/20260101-120000")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Page to write (default: report.html in the folder)")
    ] = None,
    text: Annotated[bool, typer.Option("--text", help="Print it here instead of writing a page")] = False,
    trace: Annotated[
        Path | None, typer.Option(help="Also write the timelines for chrome://tracing and ui.perfetto.dev")
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Open the page in a browser")] = False,
) -> None:
    """Show what a run did: who computed what and when, how much memory it took, and how good the prediction was.

    The page is one file that needs no network. Recorded is the last step of a run; predicted is what the simulator expects on the machine
    that the plan was made for, where it is known.

    [bold]Examples[/]

      shardstage report runs/20260101-120000 --open

      shardstage report runs/mine --text

      shardstage report runs/mine --trace trace.json
    """
    from shardstage.report import report_page, report_text
    from shardstage.timeline.trace import timeline_to_trace
    from shardstage.training.folder import RunFolder

    folder = RunFolder(path=run)
    timelines = list(_timelines(folder))
    about = _about(folder)
    if text:
        typer.echo(report_text(about, timelines), nl=False)
    else:
        page = out or run / "report.html"
        write_text(page, report_page(about, timelines))
        typer.echo(f"written to {page}")
        if show:
            webbrowser.open(page.resolve().as_uri())
    if trace is not None:
        write_text(trace, timeline_to_trace(*timelines), option="--trace")
        typer.echo(f"written to {trace}: open it in ui.perfetto.dev")


def _timelines(folder: RunFolder) -> Iterator[Timeline]:
    """Predicted and measured, as far as the run has them; says which one it has not."""
    from shardstage.timeline.file import load_timeline

    if not folder.config.exists():
        raise ConfigError(
            f"{folder.path} is not the folder of a run: it has no run.toml",
            hint=f"shardstage report {_newest(folder.path)}",
        )
    found = [path for path in (folder.predicted_timeline, folder.measured_timeline) if path.exists()]
    if not found:
        raise ConfigError(
            f"the run in {folder.path} recorded no timeline: it did not come to its last step",
            hint=f"shardstage train --resume --out {folder.path}",
        )
    if folder.predicted_timeline not in found:
        typer.echo(
            "nothing to compare with: the machine was not known when the run ended (--plan auto has a look at it, or name one in the "
            'run file: cluster = "machine.toml", which shardstage probe writes)',
            err=True,
        )
    yield from map(load_timeline, found)


def _about(folder: RunFolder) -> About:
    from shardstage.plan import load_plan, shorthand
    from shardstage.report import About
    from shardstage.training.run_config import load_run_config

    config, plan = load_run_config(folder.config), load_plan(folder.plan)
    facts = [
        ("model", config.model),
        ("plan", shorthand(plan, default_precision="float32")),
        ("batch", f"{plan.global_batch} samples, {_microbatches(plan)} a data-parallel rank"),
        ("precision", plan.precision),
        *_losses(folder),
        ("run", str(folder.path)),
    ]
    tokens = None if plan.sequence is None else plan.global_batch * plan.sequence
    return About(
        title=f"{config.model} on {plan.mesh.world_size} ranks",
        facts=tuple(facts),
        tokens=tokens,
        ranks=tuple(_notes(plan)),
    )


def _microbatches(plan: Plan) -> str:
    return f"{plan.num_microbatches} microbatch{'' if plan.num_microbatches == 1 else 'es'}"


def _notes(plan: Plan) -> Iterator[RankNote]:
    """The stages of each pipeline rank, by their first and last ops."""
    from shardstage.plan.schedule import schedule_of
    from shardstage.report import RankNote

    schedule = schedule_of(plan)
    for rank in range(schedule.num_ranks):
        stages = (
            f"{stage}: {plan.stages[stage].first} … {plan.stages[stage].last}"
            for stage in schedule.stages_of(rank)
        )
        yield RankNote(pp=rank, stages="; ".join(stages))


def _losses(folder: RunFolder) -> Iterator[tuple[str, str]]:
    if folder.summary.exists():
        summary = json.loads(folder.summary.read_text(encoding="utf-8"))
        if summary.get("first_loss") is not None:
            yield (
                "loss",
                f"{summary['first_loss']:.4f} → {summary['last_loss']:.4f} in {summary['steps']} steps",
            )


def _newest(path: Path) -> str:
    """The newest run beside or below a path, to put into a hint."""
    runs = [
        run.parent
        for place in (path, Path("runs"))
        if place.is_dir()
        for run in place.glob("*/run.toml")
        if re.match(r"\d{8}-\d{6}", run.parent.name) or place == path
    ]
    return str(max(runs, key=lambda run: run.stat().st_mtime, default=Path("runs/20260101-120000")))
