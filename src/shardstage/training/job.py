"""``TrainJob``: what the launcher decides once and every rank is given."""

from __future__ import annotations

from dataclasses import dataclass

from shardstage.graph import ModelGraph
from shardstage.plan.plan import Plan
from shardstage.training.run_config import RunConfig

__all__ = ["TrainJob"]


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """``folder`` is the run folder: plan, log, checkpoints and summary lie there."""

    config: RunConfig
    graph: ModelGraph
    plan: Plan
    folder: str
