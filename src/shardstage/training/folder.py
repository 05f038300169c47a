"""The folder of a run: what lies in it, and who may write into it.

run.toml       everything that was asked for       plan.toml      everything that was decided
log.jsonl      one line a step                     checkpoints/   the newest, complete ones
summary.json   the figures of the table            logs/          what each rank wrote to its terminal
timeline-measured.json.gz    the last step         timeline-predicted.json.gz    what the simulator expected of it
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from shardstage import checkpoint
from shardstage.errors import CheckpointError, ConfigError, PlanError
from shardstage.plan import Plan, load_plan, plan_to_toml, shorthand
from shardstage.training.run_config import RunConfig, load_run_config, run_config_to_toml

__all__ = ["EarlierRun", "RunFolder", "replace_text"]

_KEPT = ("model", "weights", "global_batch", "precision", "seed", "data")
"""What a run that goes on cannot change: its losses would be those of neither run."""


@dataclass(frozen=True, kw_only=True)
class EarlierRun:
    """The run that a folder holds; ``step`` is that of its newest checkpoint, the next to be done."""

    folder: Path
    config: RunConfig
    plan: Plan
    step: int

    def check_same_run(self, config: RunConfig) -> None:
        """Raises ConfigError where ``config`` would go on with another model, batch or text."""
        for (key, then), (_, now) in zip(_kept_values(self.config), _kept_values(config), strict=True):
            if then != now:
                raise ConfigError(
                    f"the run in {self.folder} has {key} = {_written(then)}, and it was asked to go on with {_written(now)}",
                    hint=f"{key} = {_written(then)}, or a new run: --out {_beside(self.folder)}",
                )

    def check_same_plan(self, plan: Plan) -> None:
        """Raises PlanError where the run would go on under another plan."""
        if plan != self.plan:
            raise PlanError(
                f"the run in {self.folder} follows the plan {_shown(self.plan)!r}, and it was asked to go on with "
                f"{_shown(plan)!r}: changing the plan of a run is not supported yet",
                hint=f"--resume without --plan, or a new run: --out {_beside(self.folder)}",
            )


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """Paths of a run's files; nothing is created before it is needed."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "run.toml"

    @property
    def plan(self) -> Path:
        return self.path / "plan.toml"

    @property
    def log(self) -> Path:
        return self.path / "log.jsonl"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def measured_timeline(self) -> Path:
        return self.path / "timeline-measured.json.gz"

    @property
    def predicted_timeline(self) -> Path:
        return self.path / "timeline-predicted.json.gz"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def rank_logs(self) -> Path:
        return self.path / "logs"

    def check_free(self) -> None:
        """Raises ConfigError where a new run would overwrite, or mix with, one that lies here."""
        held = [path for path in (self.config, self.log, self.checkpoints) if path.exists()]
        if held:
            can_resume = checkpoint.latest(self.checkpoints) is not None
            raise ConfigError(
                f"{self.path} holds another run already ({held[0].name})",
                hint=f"--out {_beside(self.path)} for a new run"
                + (f", or --out {self.path} --resume to go on with that one" if can_resume else ""),
            )

    def earlier_run(self) -> EarlierRun:
        """The run to go on with. Raises CheckpointError where there is none, or none that saved anything."""
        if not self.config.exists():
            raise CheckpointError(f"there is no run in {self.path} to resume", hint="leave out --resume")
        step = checkpoint.latest(self.checkpoints)
        if step is None:
            raise CheckpointError(
                f"the run in {self.path} ended before its first checkpoint: there is nothing to resume from",
                hint=f"leave out --resume, and --out {_beside(self.path)}",
            )
        return EarlierRun(
            folder=self.path, config=load_run_config(self.config), plan=load_plan(self.plan), step=step
        )

    def is_done(self, num_steps: int) -> bool:
        """Whether the run here has saved its last step, and its figures."""
        return (checkpoint.latest(self.checkpoints) or -1) >= num_steps and self.summary.exists()

    def write(self, config: RunConfig, plan: Plan) -> None:
        """Writes what was asked for and what was decided; either file is replaced whole or stays as it was."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            replace_text(self.config, run_config_to_toml(replace(config, resume=False)))
            replace_text(self.plan, plan_to_toml(plan))
        except OSError as error:
            raise ConfigError(
                f"the run folder {self.path} cannot be written: {error.strerror or error}",
                hint=f"df -h {self.path.parent}; or --out another/folder",
            ) from error

    def log_lines(self) -> Iterator[dict[str, Any]]:
        """The steps that were logged; a last line that a dying rank left half written is not one."""
        if not self.log.exists():
            return
        for line in self.log.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return


def replace_text(path: Path, text: str) -> None:
    """Writes a file whole: whoever reads it sees the old text or the new one, and a full disk leaves the old one."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _shown(plan: Plan) -> str:
    return shorthand(plan, default_precision="float32")


def _kept_values(config: RunConfig) -> Iterator[tuple[str, Any]]:
    for key in _KEPT:
        value = getattr(config, key)
        if key == "data":
            yield from ((f"data.{name}", part) for name, part in asdict(value).items())
        else:
            yield key, value
    yield "optimizer.kind", config.optimizer.kind


def _written(value: Any) -> str:
    """A value as a run file writes it."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_written, value))}]"
    return f'"{value}"' if isinstance(value, str) else str(value)


def _beside(folder: Path) -> str:
    """A name like the folder's that is still free."""
    stem = os.fspath(folder)
    return next(name for number in range(2, 10_000) if not Path(name := f"{stem}-{number}").exists())
