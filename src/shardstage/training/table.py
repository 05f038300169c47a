"""What a run prints: the plan before it, and the short table after it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from shardstage.cost import Prediction
from shardstage.training.job import TrainJob
from shardstage.units import format_bytes, format_count, format_s

__all__ = ["print_plan", "print_summary"]


def print_plan(console: Console, job: TrainJob) -> None:
    """One line on the model and one on the plan."""
    plan, config = job.plan, job.config
    mesh = ", ".join(f"{axis}={plan.mesh.size(axis)}" for axis in ("dp", "tp", "pp"))
    details = [
        f"zero={plan.zero}",
        f"recompute={plan.recompute}",
        f"{plan.num_microbatches} microbatches of {plan.microbatch}",
    ]
    if plan.mesh.pp > 1:
        details.append(plan.schedule)
    if plan.is_sequence_parallel:
        details.append("sequence parallel")
    console.print(
        f"[bold]model[/]  {config.model}: {format_count(job.graph.num_parameters)} parameters, {plan.precision}"
    )
    console.print(f"[bold]plan[/]   {mesh} on {plan.mesh.world_size} ranks; {', '.join(details)}")


def print_summary(
    console: Console, job: TrainJob, *, prediction: Prediction | None, is_proved: bool | None
) -> None:
    """Loss, speed, predicted against measured, and where everything lies; every figure is this run's."""
    folder = Path(job.folder)
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    table = Table(show_edge=False, pad_edge=False, box=None)
    table.add_column("")
    table.add_column("measured", justify="right")
    table.add_column("predicted", justify="right")
    first, last = summary["first_loss"], summary["last_loss"]
    table.add_row("loss, first → last step", "-" if first is None else f"{first:.4f} → {last:.4f}", "")
    if is_proved is not None:
        table.add_row("equal to a single device", "yes" if is_proved else "NO", "")
    rate, step_time_s = summary["tokens_per_s"], summary["step_time_s"]
    table.add_row(
        "tokens/s",
        "-" if rate is None else f"{rate:,.0f}",
        "" if prediction is None else f"{prediction.tokens_per_s:,.0f}",
    )
    table.add_row(
        "step time",
        "-" if step_time_s is None else format_s(step_time_s),
        "" if prediction is None else _range_of_s(prediction),
    )
    for rank, peak_bytes in enumerate(summary["peak_bytes"]):
        expected = (
            ""
            if prediction is None
            else format_bytes(prediction.rank_peak_bytes(job.plan.mesh.coordinate(rank, "pp")))
        )
        table.add_row(f"peak memory, rank {rank}", format_bytes(peak_bytes), expected)
    console.print()
    console.print(table)
    console.print()
    for what, name in (
        ("plan", "plan.toml"),
        ("log", "log.jsonl"),
        ("checkpoint", "checkpoints"),
        ("settings", "run.toml"),
    ):
        console.print(f"{what:<11}{folder / name}", soft_wrap=True)


def _range_of_s(prediction: Prediction) -> str:
    low, expected, high = prediction.step_time_low_s, prediction.step_time_s, prediction.step_time_high_s
    return f"{format_s(expected)} ({format_s(low)} to {format_s(high)})"
