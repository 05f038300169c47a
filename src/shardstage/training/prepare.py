"""``prepare``: from what was asked for to a job whose every decision is made, before any rank starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from shardstage.checkpoint.export import check_export_folder
from shardstage.cluster import Cluster
from shardstage.data import PackedText, SampleSource
from shardstage.errors import ConfigError, DataError
from shardstage.graph import ModelGraph
from shardstage.graph.fallback import capture_or_blocks
from shardstage.graph.source import ModelSource
from shardstage.plan import Request, check, check_samples, complete, load_plan, parse_request
from shardstage.plan.plan import Plan, Precision
from shardstage.planner import search
from shardstage.program import lower, verify
from shardstage.training.folder import EarlierRun, RunFolder
from shardstage.training.job import TrainJob, source_of
from shardstage.training.run_config import RunConfig, load_run_config
from shardstage.training.samples import reads_text, samples_of

__all__ = ["choose_plan", "prepare", "read_job"]


def prepare(config: RunConfig, *, num_ranks: int, cluster: Cluster | None, folder: Path) -> TrainJob:
    """Checks everything that can be checked on one process, chooses the plan and writes the run folder.

    ``cluster`` is needed for ``plan = "auto"`` only. Raises a ShardstageError for whatever would fail later.
    """
    run_folder = RunFolder(path=folder)
    earlier = run_folder.earlier_run() if config.resume else None
    if earlier is None:
        run_folder.check_free()
    config = replace(config, ranks=num_ranks, out=str(folder))
    config = replace(config, precision=_precision(config, earlier))
    _check_device(config)
    _check_weights(config)
    source = source_of(config)
    _check_export(config, source)
    config = _with_objective(config, source)
    _check_length(config, source)
    if earlier is not None:
        earlier.check_same_run(config)
    _check_data(config, source)
    graph = capture_or_blocks(source, sequence=config.data.sequence, dtype=config.precision)
    if earlier is None:
        plan = choose_plan(config, graph, num_ranks=num_ranks, cluster=cluster)
    else:
        plan = _plan_to_go_on_with(config, earlier, graph, num_ranks=num_ranks)
        config = replace(config, plan=earlier.config.plan)
    check(plan, graph, num_ranks=num_ranks, max_sequence=source.max_sequence)
    verify(lower(graph, plan))
    run_folder.write(config, plan)
    return TrainJob(config=config, graph=graph, plan=plan, folder=str(folder))


def read_job(folder: Path) -> TrainJob:
    """The job that a run folder was made for."""
    files = RunFolder(path=folder)
    config = load_run_config(files.config)
    graph = capture_or_blocks(source_of(config), sequence=config.data.sequence, dtype=config.precision)
    return TrainJob(config=config, graph=graph, plan=load_plan(files.plan), folder=str(folder))


def choose_plan(config: RunConfig, graph: ModelGraph, *, num_ranks: int, cluster: Cluster | None) -> Plan:
    """The plan that the run names: searched, completed from a shorthand, or read from a file; always checked."""
    sequence = None if graph.sequence is None else config.data.sequence
    if config.plan == "auto" and not graph.is_of_modules:
        if cluster is None:
            raise ConfigError(
                'plan = "auto" needs to know the machine', hint="shardstage probe --out cluster.toml"
            )
        plan = search(
            graph,
            cluster,
            num_ranks=num_ranks,
            global_batch=config.global_batch,
            sequence=sequence,
            precision=config.precision,
        ).best
    elif config.plan.endswith(".toml"):
        plan = load_plan(config.plan)
        check_samples(plan, config.plan, global_batch=config.global_batch, sequence=sequence)
    else:
        plan = complete(
            Request() if config.plan == "auto" else parse_request(config.plan),  # nothing could be compared
            graph,
            num_ranks=num_ranks,
            global_batch=config.global_batch,
            sequence=sequence,
            precision=config.precision,
            cluster=cluster,
        )
    plan = replace(plan, graph_fingerprint=plan.graph_fingerprint or graph.fingerprint)
    check(plan, graph, num_ranks=num_ranks)
    return plan


def _plan_to_go_on_with(config: RunConfig, earlier: EarlierRun, graph: ModelGraph, *, num_ranks: int) -> Plan:
    """The plan of the earlier run; one that was named must be the same."""
    if config.plan not in ("auto", earlier.config.plan):
        earlier.check_same_plan(choose_plan(config, graph, num_ranks=num_ranks, cluster=None))
    return earlier.plan


def _precision(config: RunConfig, earlier: EarlierRun | None) -> Precision:
    """The dtype that the plan asks for, or else the run: the model is captured in it."""
    if config.plan == "auto":
        return config.precision if earlier is None else earlier.config.precision
    if config.plan.endswith(".toml"):
        return load_plan(config.plan).precision
    return parse_request(config.plan).precision or config.precision


def _with_objective(config: RunConfig, source: ModelSource) -> RunConfig:
    """The run with the labels that the model's task needs, where these are made from text."""
    if config.data.samples or not reads_text(source):
        return config
    return config.with_changes(**{"data.objective": source.task.objective})


def _check_tensors(data: SampleSource, source: ModelSource) -> None:
    """A sample has the tensors that the model's task reads."""
    found, wanted = set(data.sample(0)), set(source.task.inputs)
    if found != wanted:
        raise DataError(
            f"a sample holds {', '.join(sorted(found))}, and {source.name} reads {', '.join(sorted(wanted))}",
            hint=f"return {{{', '.join(f'{name!r}: ...' for name in sorted(wanted))}}}",
        )


def _check_device(config: RunConfig) -> None:
    num_devices = torch.cuda.device_count()
    if config.device == "cuda" and not num_devices:
        raise ConfigError('device = "cuda", and torch sees no CUDA device here', hint='device = "cpu"')


def _check_weights(config: RunConfig) -> None:
    if config.weights and not any(Path(config.weights).expanduser().glob("*.safetensors")):
        raise ConfigError(
            f"weights = {config.weights!r} is no folder with *.safetensors files",
            hint='weights = ""  # draws them from the seed',
        )


def _check_export(config: RunConfig, source: ModelSource) -> None:
    """An export that cannot be written would be noticed after the training."""
    if not config.export_hf:
        return
    if source.hf_config is None:
        raise ConfigError(
            f"{config.model} is no Hugging Face model, so it has no such folder", hint="leave out --export-hf"
        )
    check_export_folder(config.export_hf)


def _check_length(config: RunConfig, source: ModelSource) -> None:
    if source.max_sequence is not None and config.data.sequence > source.max_sequence:
        raise ConfigError(
            f"{config.model} takes at most {source.max_sequence} tokens, and a sample has {config.data.sequence}",
            hint=f"--seq {source.max_sequence}",
        )


def _check_data(config: RunConfig, source: ModelSource) -> None:
    data = samples_of(config.data, source)
    if data.num_samples < config.global_batch:
        raise DataError(
            f"the data holds {data.num_samples} samples, and a step takes {config.global_batch}",
            hint=f"--batch {max(1, data.num_samples)}",
        )
    if not isinstance(data, PackedText):
        _check_tensors(data, source)
    elif source.vocab_size is not None and data.vocab_size > source.vocab_size:
        raise DataError(
            f"the tokenizer has {data.vocab_size} tokens, and the model an embedding for {source.vocab_size}",
            hint="use the model's own tokenizer: [data] tokenizer = ...",
        )
