"""``shardstage prove``: shows that a plan computes what one device computes, or says where it does not."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from shardstage.cli import options
from shardstage.cli.machine import cluster_named
from shardstage.cli.waiting import capturing
from shardstage.errors import ConfigError

if TYPE_CHECKING:  # what imports torch is imported when it is needed: help comes at once
    from shardstage.parity import Fault, Verdict
    from shardstage.training import RunConfig

__all__ = ["prove"]


def prove(
    run: options.RunFile = None,
    model: options.GivenModel = None,
    plan: options.GivenPlan = None,
    ranks: Annotated[int | None, typer.Option(help="Local ranks to start")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps to compare, at most 4")] = None,
    batch: options.GivenBatch = None,
    seq: options.GivenSequence = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, order of samples and dropout")] = None,
    precision: Annotated[str | None, typer.Option(help="float32, bfloat16 or float64")] = None,
    data: options.Data = None,
    inject_fault: Annotated[
        str | None, typer.Option(help="Break the run on purpose, to see it found ('list' names the faults)")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="File for the verdict as JSON")] = None,
) -> int:
    """Prove that a plan computes what one device computes.

    Trains a few steps twice with the same weights, samples and dropout masks: on the plan, and with the unmodified model on one process in
    float64. Compares losses, gradients and parameters; the tolerance is derived from the precision and printed with its derivation.

    Exit code 0: equal. 1: not equal; the first wrong module, the rank and the probable cause are named. 2: bad input.

    [bold]Examples[/]

      shardstage prove --model gpt2-tiny --ranks 4 --plan "tp=2,pp=2"

      shardstage prove --ranks 2 --plan "dp=2" --inject-fault missing-reduction
    """
    if inject_fault == "list":
        return _list_faults()
    config = _config(
        run,
        options.typed(
            {
                "model": model,
                "plan": plan,
                "ranks": ranks,
                "steps": steps,
                "global_batch": batch,
                "data.sequence": seq,
                "seed": seed,
                "precision": precision,
                "data.paths": None if data is None else tuple(data),
            }
        ),
    )
    config = _with_samples(config)
    return _prove(config, _fault(inject_fault), report)


def _config(run: Path | None, changes: dict[str, Any]) -> RunConfig:
    from shardstage.training import RunConfig, load_run_config

    config = load_run_config(run) if run is not None else RunConfig()
    return config.with_changes(**changes, resume=False, out=f"runs/{time.strftime('%Y%m%d-%H%M%S')}-prove")


def _with_samples(config: RunConfig) -> RunConfig:
    """A proof of a model that reads no text needs no data set: random tensors serve as well."""
    from shardstage.training.job import source_of
    from shardstage.training.samples import RANDOM, reads_text

    if config.data.samples or reads_text(source_of(config)):
        return config
    return config.with_changes(**{"data.samples": RANDOM})


def _prove(config: RunConfig, fault: Fault | None, report: Path | None) -> int:
    from shardstage.parity import prove_job
    from shardstage.training.prepare import prepare
    from shardstage.training.table import print_plan

    console = Console(highlight=False, emoji=False)
    cluster = None
    if config.plan == "auto":
        with console.status("looking at this machine (about 15 s, once)"):
            cluster = cluster_named(config.cluster, ranks=config.ranks)
    with capturing(console, config.model, sequence=config.data.sequence, then=", choosing a plan"):
        job = prepare(config, num_ranks=config.ranks, cluster=cluster, folder=Path(config.out))
    print_plan(console, job)
    with console.status("proving the plan on a single device"):
        verdict = prove_job(job, fault=fault)
    console.print(verdict.text(), markup=False, soft_wrap=True)
    _write(verdict, report or Path(job.folder) / "verdict.json")
    return 0 if verdict.is_equal else 1


def _write(verdict: Verdict, path: Path) -> None:
    try:
        path.write_text(verdict.to_json(), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"the report {path} cannot be written: {error.strerror}", hint="--report verdict.json"
        ) from error


def _fault(name: str | None) -> Fault | None:
    from shardstage.parity import FAULTS

    fault = next((known for known in FAULTS if known == name), None)
    if name is not None and fault is None:
        raise ConfigError(f"there is no fault {name!r}", hint=f"--inject-fault {next(iter(FAULTS))}")
    return fault


def _list_faults() -> int:
    from shardstage.parity import FAULTS

    for name, effect in FAULTS.items():
        typer.echo(f"{name:<22}{effect}")
    return 0
