"""``RecordedRun``: what a run folder tells about the time of a step, and how it compares with the formulas."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from shardstage.cluster import Cluster
from shardstage.cost.calibrate import Observation
from shardstage.errors import ClusterError, ConfigError
from shardstage.graph import ModelGraph
from shardstage.graph.fallback import capture_or_blocks
from shardstage.plan import Plan, load_plan
from shardstage.planner import predict
from shardstage.training.folder import RunFolder
from shardstage.training.job import source_of
from shardstage.training.rank import WARM_UP_STEPS
from shardstage.training.run_config import RunConfig, load_run_config

__all__ = ["RecordedRun", "TooShortError", "check_same_machine", "observations_of", "read_run"]


class TooShortError(ConfigError):
    """A run, or a proof, without a step after the warm-up."""


@dataclass(frozen=True, kw_only=True)
class RecordedRun:
    """A run that made steps: ``step_time_s`` is the median after the warm-up. ``device_kind`` and ``device`` are None where it did not
    say what it ran on."""

    folder: Path
    config: RunConfig
    plan: Plan
    step_time_s: float
    device_kind: str | None
    device: str | None


def read_run(path: Path) -> RecordedRun:
    """Reads a run folder. Raises ConfigError where it is none, TooShortError where it has no step after the warm-up."""
    folder = RunFolder(path=path)
    if not (folder.config.exists() and folder.plan.exists()):
        raise ConfigError(
            f"{path} is not the folder of a training run: it has no {'plan' if folder.config.exists() else 'run'}.toml",
            hint="shardstage calibrate runs/20260101-120000",
        )
    steps_s = [float(line["step_time_s"]) for line in folder.log_lines() if "step_time_s" in line]
    if len(steps_s) <= WARM_UP_STEPS:
        raise TooShortError(
            f"the run in {path} logged {len(steps_s)} steps, and the first {WARM_UP_STEPS} are warm-up",
            hint=f"leave it out, or: shardstage train --run {folder.config} --steps {10 * WARM_UP_STEPS} --out {path}-longer",
        )
    config, summary = load_run_config(folder.config), _summary(folder)
    return RecordedRun(
        folder=path,
        config=config,
        plan=load_plan(folder.plan),
        step_time_s=median(steps_s[WARM_UP_STEPS:]),
        device_kind=summary.get("device_kind", None if config.device == "auto" else config.device),
        device=summary.get("device"),
    )


def check_same_machine(runs: Sequence[RecordedRun]) -> None:
    """Raises ClusterError where runs say that they were made on different machines."""
    for what, said in (
        ("on", {run.folder: run.device for run in runs}),
        ("on", {run.folder: run.device_kind for run in runs}),
        ("for the cluster", {run.folder: _named_cluster(run.config) for run in runs}),
    ):
        known = {folder: name for folder, name in said.items() if name is not None}
        first = next(iter(known), None)
        for folder, name in known.items():
            if first is not None and name != known[first]:
                raise ClusterError(
                    f"the run {first} was made {what} {known[first]}, the run {folder} {what} {name}",
                    hint="shardstage calibrate, once for the runs of each machine, each with its --cluster and --out",
                )


def observations_of(runs: Sequence[RecordedRun], cluster: Cluster) -> tuple[Observation, ...]:
    """One observation a run: its step by the formulas on ``cluster``, and as it was measured.

    Models are captured once for all their runs. Raises ConfigError where a model is no longer the one that a run trained.
    """
    graphs: dict[tuple[str, str, int, str], ModelGraph] = {}
    return tuple(_observation(run, _graph(run, graphs), cluster) for run in runs)


def _observation(run: RecordedRun, graph: ModelGraph, cluster: Cluster) -> Observation:
    if run.plan.graph_fingerprint not in ("", graph.fingerprint):
        raise ConfigError(
            f"the model {run.config.model} has changed since the run in {run.folder}: its plan is of another graph",
            hint=f"leave out {run.folder}",
        )
    return Observation(
        name=str(run.folder),
        parts=predict(graph, run.plan, cluster.uncalibrated()).parts,
        measured_s=run.step_time_s,
        device_kind=run.device_kind or cluster.device.kind,
    )


def _graph(run: RecordedRun, known: dict[tuple[str, str, int, str], ModelGraph]) -> ModelGraph:
    config = run.config
    key = (config.model, config.data.tokenizer, config.data.sequence, config.precision)
    if key not in known:
        known[key] = capture_or_blocks(
            source_of(config), sequence=config.data.sequence, dtype=config.precision
        )
    return known[key]


def _named_cluster(config: RunConfig) -> str | None:
    """The cluster that a run asked for; ``local`` is whatever it ran on."""
    return None if config.cluster == "local" else config.cluster


def _summary(folder: RunFolder) -> dict[str, Any]:
    """The figures at a run's end; none of one that was stopped."""
    if not folder.summary.exists():
        return {}
    found: dict[str, Any] = json.loads(folder.summary.read_text(encoding="utf-8"))
    return found
