"""``shardstage train``: plans, runs and, on request, proves a training run."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from shardstage.cli import options
from shardstage.cli.machine import cluster_named, known_cluster
from shardstage.cli.waiting import capturing
from shardstage.cluster import Cluster
from shardstage.errors import ConfigError
from shardstage.runtime.environment import RankEnvironment

if TYPE_CHECKING:  # what imports torch is imported when it is needed: help comes at once
    from shardstage.cost import Prediction
    from shardstage.training import RunConfig
    from shardstage.training.job import TrainJob

__all__ = ["train"]


def train(
    run: options.RunFile = None,
    model: options.GivenModel = None,
    plan: options.GivenPlan = None,
    ranks: Annotated[
        int | None, typer.Option(help="Local ranks to start (ignored under torchrun and srun)")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps in all, resumed ones included")] = None,
    batch: options.GivenBatch = None,
    seq: options.GivenSequence = None,
    data: options.Data = None,
    out: Annotated[str | None, typer.Option(help="Run folder (default: runs/<time>)")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the run folder's newest checkpoint")
    ] = False,
    prove: Annotated[
        bool, typer.Option("--prove", help="Then prove the run equal to a single device's")
    ] = False,
    export_hf: Annotated[str | None, typer.Option(help="Folder for transformers' from_pretrained")] = None,
) -> int:
    """Train a model on text, split over ranks as a plan says.

    Everything else (optimizer, precision, tokenizer, checkpoints) stands in a run file; each run writes its own, complete, into its folder.

    [bold]Examples[/]

      shardstage train --model llama-tiny --ranks 4 --plan "tp=2,pp=2"

      shardstage train --run run.toml --steps 500 --prove

      shardstage train --resume --out runs/mine --steps 1000

      torchrun --nproc-per-node 4 -m shardstage train --run-file run.toml
    """
    config = _base(run, out, is_resumed=resume).with_changes(
        **options.typed(
            {
                "model": model,
                "plan": plan,
                "ranks": ranks,
                "steps": steps,
                "global_batch": batch,
                "data.sequence": seq,
                "data.paths": None if data is None else tuple(data),
                "out": out,
                "resume": resume or None,
                "export_hf": export_hf,
            }
        )
    )
    from shardstage.runtime.environment import detect_environment

    environment = detect_environment()
    if environment is None:
        return _launch(config, is_proved=prove)
    return _join(environment, config, is_proved=prove)


def _base(run: Path | None, out: str | None, *, is_resumed: bool) -> RunConfig:
    """What the options override: the run file, the settings of the run to go on with, or the defaults."""
    from shardstage.training import RunConfig, load_run_config
    from shardstage.training.folder import RunFolder

    if run is not None:
        return load_run_config(run)
    if is_resumed:
        if out is None:
            raise ConfigError(
                "--resume goes on with a run, and nothing says which", hint=f"--resume --out {_newest_run()}"
            )
        return RunFolder(path=Path(out)).earlier_run().config
    return RunConfig()


def _newest_run() -> str:
    runs = [path.parent for path in Path("runs").glob("*/run.toml")]
    return str(max(runs, default="runs/<name>"))


def _launch(config: RunConfig, *, is_proved: bool) -> int:
    """Starts the ranks on this host."""
    from shardstage.runtime.launch import launch
    from shardstage.training.folder import RunFolder
    from shardstage.training.prepare import prepare
    from shardstage.training.rank import train_rank
    from shardstage.training.table import print_plan, print_stopped

    console = Console(highlight=False, emoji=False)
    folder = RunFolder(path=Path(_folder(config)))
    cluster = None
    if config.plan == "auto" and not config.resume:
        folder.check_free()  # a refusal should not have to wait for the measurement
        with console.status("looking at this machine (about 15 s, once)"):
            cluster = cluster_named(config.cluster, ranks=config.ranks)
    with capturing(console, config.model, sequence=config.data.sequence, then=", choosing a plan"):
        job = prepare(config, num_ranks=config.ranks, cluster=cluster, folder=folder.path)
    print_plan(console, job)
    if folder.is_done(job.config.steps):
        console.print(
            f"all {job.config.steps} steps are done already: --steps says how many there are in all"
        )
        return _finish(console, job, cluster, is_proved=is_proved)
    console.print(
        f"[bold]ranks[/]  starting {job.config.ranks}; what they write goes to {folder.rank_logs}",
        soft_wrap=True,
    )
    try:
        launch(train_rank, (job,), num_ranks=job.config.ranks, log_dir=folder.rank_logs)
    except BaseException:
        print_stopped(Console(stderr=True, highlight=False, emoji=False), job)
        raise
    return _finish(console, job, cluster, is_proved=is_proved)


def _join(environment: RankEnvironment, config: RunConfig, *, is_proved: bool) -> int:
    """Runs as the rank that torchrun or srun started; rank 0 prints. The proof starts ranks of its own, on rank 0's host."""
    from shardstage.runtime.launch import run_as_rank
    from shardstage.training.joined import train_as_rank

    cluster = partial(cluster_named, config.cluster, ranks=environment.world_size)
    folder = _folder(config)
    run_as_rank(train_as_rank, (config, folder, cluster), environment)
    if environment.rank:
        return 0
    from shardstage.training.prepare import read_job

    return _finish(Console(highlight=False, emoji=False), read_job(folder), None, is_proved=is_proved)


def _finish(console: Console, job: TrainJob, cluster: Cluster | None, *, is_proved: bool) -> int:
    """The proof, the export and the table."""
    from shardstage.training.table import print_summary

    verdict = None
    if is_proved:
        from shardstage.parity import prove_job

        with console.status("proving the run on a single device"):
            verdict = prove_job(job)
        console.print(verdict.text(), markup=False, soft_wrap=True)
    if job.config.export_hf:
        _export(job)
    machine = cluster or known_cluster(job.config.cluster, ranks=job.config.ranks)
    print_summary(
        console,
        job,
        prediction=_predicted(job, machine),
        is_proved=None if verdict is None else verdict.is_equal,
    )
    return 0 if verdict is None or verdict.is_equal else 1


def _export(job: TrainJob) -> None:
    """Writes the folder for transformers, the tokenizer beside it where it is one of a folder."""
    from shardstage.checkpoint import export_hf
    from shardstage.training.folder import RunFolder
    from shardstage.training.job import source_of

    tokenizer = job.config.data.tokenizer
    export_hf(
        RunFolder(path=Path(job.folder)).checkpoints,
        source_of(job.config),
        job.config.export_hf,
        tokenizer=tokenizer if Path(tokenizer).exists() else None,
    )


def _predicted(job: TrainJob, cluster: Cluster | None) -> Prediction | None:
    """What the plan was expected to take, where the machine has been measured and the model's ops are known; its timeline goes into the
    run folder."""
    if cluster is None or job.graph.is_of_modules or cluster.num_devices < job.plan.mesh.world_size:
        return None
    from shardstage.planner import predict
    from shardstage.training.timelines import write_predicted_timeline

    write_predicted_timeline(job, cluster)
    return predict(job.graph, job.plan, cluster)


def _folder(config: RunConfig) -> Path:
    """The run folder: the one asked for, or a new one by the time of day."""
    return Path(config.out) if config.out else Path("runs") / time.strftime("%Y%m%d-%H%M%S")
