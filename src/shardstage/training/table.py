"""What a run prints: the plan before it, the short table after it, and what is left of one that was stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from shardstage import checkpoint
from shardstage.cost import Prediction
from shardstage.plan import Plan, check
from shardstage.training.folder import RunFolder
from shardstage.training.job import TrainJob
from shardstage.units import format_bytes, format_count, format_s

__all__ = ["print_plan", "print_stopped", "print_summary"]


def print_plan(console: Console, job: TrainJob) -> None:
    """One line on the model and one on the plan, and what is odd about them."""
    plan, config = job.plan, job.config
    console.print(
        f"[bold]model[/]  {config.model}: {format_count(job.graph.num_parameters)} parameters, {plan.precision}",
        soft_wrap=True,
    )
    console.print(f"[bold]plan[/]   {', '.join(_details(plan))}", soft_wrap=True)
    for note in (*job.graph.notes, *check(plan, job.graph)):
        console.print(f"[yellow]note[/]   {note}", soft_wrap=True)


def print_summary(
    console: Console, job: TrainJob, *, prediction: Prediction | None, is_proved: bool | None
) -> None:
    """Loss, speed, predicted against measured, and where everything lies; every figure is this run's."""
    folder = RunFolder(path=Path(job.folder))
    summary: dict[str, Any] = json.loads(folder.summary.read_text(encoding="utf-8"))
    table = Table(show_edge=False, pad_edge=False, box=None)
    table.add_column("")
    table.add_column("measured", justify="right")
    if prediction is not None:
        table.add_column("predicted", justify="right")
    for row in _rows(summary, job.plan, prediction, is_proved):
        table.add_row(*row[: len(table.columns)])
    console.print()
    console.print(table)
    console.print()
    for what, path in (
        ("settings", folder.config),
        ("plan", folder.plan),
        ("log", folder.log),
        ("checkpoint", _newest_checkpoint(folder)),
        ("for transformers", job.config.export_hf),
    ):
        if path:
            console.print(f"{what:<17}{path}", soft_wrap=True)


def print_stopped(console: Console, job: TrainJob) -> None:
    """What a run that did not end by itself leaves behind, and how to go on with it; shows the cursor that its bar had hidden."""
    Console().show_cursor(True)
    folder = RunFolder(path=Path(job.folder))
    num_done = max((line["step"] + 1 for line in folder.log_lines()), default=0)
    saved = checkpoint.latest(folder.checkpoints)
    console.print(f"\nstopped after {num_done} of {job.config.steps} steps; ", end="")
    if saved is None:
        console.print("nothing was saved yet (a run file's checkpoint_every says how often)", soft_wrap=True)
        return
    console.print(f"step {saved} is saved in {folder.checkpoints}", soft_wrap=True)
    console.print(f"go on with: shardstage train --resume --out {folder.path}", soft_wrap=True, markup=False)


def _details(plan: Plan) -> Iterator[str]:
    mesh = plan.mesh
    yield f"dp={mesh.dp}, tp={mesh.tp}, pp={mesh.pp} on {_counted(mesh.world_size, 'rank')}"
    yield f"zero={plan.zero}"
    if plan.recompute != "none" or plan.stage_recompute:
        yield f"recompute={'/'.join(map(str, plan.stage_recompute)) or plan.recompute}"
    if plan.recompute_modules:
        yield f"modules={'/'.join(plan.recompute_modules)}"
    yield f"{_counted(plan.num_microbatches, 'microbatch', 'microbatches')} of {plan.microbatch}"
    if mesh.pp > 1:
        yield plan.schedule
    if plan.is_sequence_parallel:
        yield "sequence parallel"
    if plan.is_compiled:
        yield "compiled"


def _rows(
    summary: dict[str, Any], plan: Plan, prediction: Prediction | None, is_proved: bool | None
) -> Iterator[tuple[str, str, str]]:
    first, last = summary["first_loss"], summary["last_loss"]
    yield "loss, first → last step", "-" if first is None else f"{first:.4f} → {last:.4f}", ""
    if is_proved is not None:
        yield "equal to a single device", "yes" if is_proved else "NO", ""
    rate, step_time_s = summary["tokens_per_s"], summary["step_time_s"]
    yield (
        "tokens/s",
        "-" if rate is None else f"{rate:,.0f}",
        "" if prediction is None else f"{prediction.tokens_per_s:,.0f}",
    )
    yield (
        "step time, median",
        "-" if step_time_s is None else format_s(step_time_s),
        "" if prediction is None else _range_of_s(prediction),
    )
    for rank, peak_bytes in enumerate(summary["peak_bytes"]):
        stage = plan.mesh.coordinate(rank, "pp")
        expected = "" if prediction is None else format_bytes(prediction.rank_peak_bytes(stage))
        yield f"peak memory, rank {rank}", format_bytes(peak_bytes), expected


def _range_of_s(prediction: Prediction) -> str:
    low, expected, high = prediction.step_time_low_s, prediction.step_time_s, prediction.step_time_high_s
    return f"{format_s(expected)} ({format_s(low)} to {format_s(high)})"


def _newest_checkpoint(folder: RunFolder) -> str:
    step = checkpoint.latest(folder.checkpoints)
    return "" if step is None else str(folder.checkpoints / f"step-{step:08d}")


def _counted(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
