"""``TrainJob``: what the launcher decides once and every rank is given."""

from __future__ import annotations

from dataclasses import dataclass

from shardstage.data import load_tokenizer
from shardstage.graph import ModelGraph
from shardstage.graph.source import ModelSource, load_model
from shardstage.plan.plan import Plan
from shardstage.training.run_config import RunConfig

__all__ = ["TrainJob", "source_of"]


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """``folder`` is the run folder: plan, log, checkpoints and summary lie there."""

    config: RunConfig
    graph: ModelGraph
    plan: Plan
    folder: str


def source_of(config: RunConfig) -> ModelSource:
    """The model that the run names, with the vocabulary of its tokenizer where the model leaves that open."""
    return load_model(config.model, tokenizer_vocab=load_tokenizer(config.data.tokenizer).vocab_size)
