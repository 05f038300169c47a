"""``prepare``: from what was asked for to a job whose every decision is made, before any rank starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from shardstage.cluster import Cluster
from shardstage.data import PackedText, load_tokenizer
from shardstage.errors import ConfigError, DataError
from shardstage.graph import ModelGraph
from shardstage.graph.capture import capture
from shardstage.graph.file import fingerprint
from shardstage.graph.source import ModelSource, load_model
from shardstage.plan import check, complete, load_plan, parse_request, save_plan
from shardstage.plan.plan import Plan
from shardstage.planner import search
from shardstage.training.job import TrainJob
from shardstage.training.run_config import RunConfig, run_config_to_toml

__all__ = ["capture_for", "choose_plan", "prepare", "source_of"]


def prepare(config: RunConfig, *, num_ranks: int, cluster: Cluster | None, folder: Path) -> TrainJob:
    """Checks everything that can be checked on one process, chooses the plan and writes the run folder.

    ``cluster`` is needed for ``plan = "auto"`` only. Raises a ShardstageError for whatever would fail later.
    """
    config = replace(config, ranks=num_ranks, out=str(folder))
    source = source_of(config)
    config = replace(config, data=replace(config.data, objective=source.task.objective))
    _check_data(config, source)
    graph = capture_for(config, source)
    plan = choose_plan(config, graph, num_ranks=num_ranks, cluster=cluster)
    job = TrainJob(config=config, graph=graph, plan=plan, folder=str(folder))
    _write_folder(job)
    return job


def source_of(config: RunConfig) -> ModelSource:
    """The model that the run names, with the vocabulary of its tokenizer where the model leaves that open."""
    return load_model(config.model, tokenizer_vocab=load_tokenizer(config.data.tokenizer).vocab_size)


def capture_for(config: RunConfig, source: ModelSource) -> ModelGraph:
    return capture(source, sequence=config.data.sequence, dtype=config.precision)


def choose_plan(config: RunConfig, graph: ModelGraph, *, num_ranks: int, cluster: Cluster | None) -> Plan:
    """The plan that the run names: searched, completed from a shorthand, or read from a file; always checked."""
    if config.plan == "auto":
        if cluster is None:
            raise ConfigError(
                'plan = "auto" needs to know the machine', hint="shardstage probe --out cluster.toml"
            )
        plan = search(
            graph,
            cluster,
            num_ranks=num_ranks,
            global_batch=config.global_batch,
            sequence=config.data.sequence,
            precision=config.precision,
        ).best
    elif config.plan.endswith(".toml"):
        plan = load_plan(config.plan)
    else:
        plan = complete(
            parse_request(config.plan),
            graph,
            num_ranks=num_ranks,
            global_batch=config.global_batch,
            sequence=config.data.sequence,
            precision=config.precision,
        )
    plan = replace(plan, graph_fingerprint=plan.graph_fingerprint or fingerprint(graph))
    check(plan, graph, num_ranks=num_ranks)
    return plan


def _check_data(config: RunConfig, source: ModelSource) -> None:
    data = PackedText.from_config(config.data)
    if data.num_samples < config.global_batch:
        raise DataError(
            f"the data holds {data.num_samples} samples of {config.data.sequence} tokens, and a step takes {config.global_batch}",
            hint=f"--batch {max(1, data.num_samples)}",
        )
    if source.vocab_size is not None and data.vocab_size > source.vocab_size:
        raise DataError(
            f"the tokenizer has {data.vocab_size} tokens, and the model an embedding for {source.vocab_size}",
            hint="use the model's own tokenizer: [data] tokenizer = ...",
        )


def _write_folder(job: TrainJob) -> None:
    folder = Path(job.folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.toml").write_text(run_config_to_toml(job.config), encoding="utf-8")
        save_plan(job.plan, folder / "plan.toml")
    except OSError as error:
        raise ConfigError(
            f"the run folder {folder} cannot be written: {error.strerror}", hint="--out another/folder"
        ) from error
