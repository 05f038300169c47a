"""The live progress bar of a run, or plain lines where there is no terminal."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from shardstage.plan.plan import Plan
from shardstage.runtime.engine import StepResult
from shardstage.training.run_config import RunConfig

__all__ = ["Progress"]

REDRAW_S = 0.2
"""Between two drawings of the bar: often enough to look alive, rare enough to cost nothing (a drawing takes about 2 ms)."""


class Progress:
    """Shows step, loss and tokens/s; a context manager. Off a terminal it prints about ten lines a run."""

    def __init__(self, config: RunConfig, plan: Plan, first_step: int, *, is_shown: bool) -> None:
        self._tokens_per_step = plan.global_batch * (plan.sequence or 1)
        self._num_steps = config.steps
        self._every = max(1, (config.steps - first_step) // 10)
        self._is_shown = is_shown
        self._drawn_s = 0.0
        self._console = Console()
        self._bar = Bar(
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[rate]} tokens/s"),
            TimeRemainingColumn(),
            console=self._console,
            auto_refresh=False,  # a drawing thread would take the core from the rank that draws
            disable=not (is_shown and self._console.is_terminal),
        )
        self._task = self._bar.add_task(
            "training", total=config.steps, completed=first_step, loss="-", rate="-"
        )

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self, step: int, result: StepResult, elapsed_s: float) -> None:
        rate = f"{self._tokens_per_step / elapsed_s:,.0f}"
        self._bar.update(self._task, completed=step + 1, loss=f"{result.loss:.4f}", rate=rate)
        self._draw(is_last=step + 1 == self._num_steps)
        is_line_due = step % self._every == 0 or step + 1 == self._num_steps
        if self._is_shown and not self._console.is_terminal and is_line_due:
            norm = "" if result.gradient_norm is None else f"  grad norm {result.gradient_norm:.3f}"
            self._console.print(
                f"step {step + 1}/{self._num_steps}  loss {result.loss:.4f}{norm}  {rate} tokens/s",
                highlight=False,
            )

    def _draw(self, *, is_last: bool) -> None:
        now_s = time.monotonic()
        if is_last or now_s - self._drawn_s >= REDRAW_S:
            self._drawn_s = now_s
            self._bar.refresh()
