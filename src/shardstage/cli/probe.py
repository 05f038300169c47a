"""``shardstage probe``: measures this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shardstage.cli import options
from shardstage.cli.machine import num_default_ranks, probe_machine
from shardstage.cli.outputs import require_folder
from shardstage.cluster import save

__all__ = ["probe"]


def probe(
    ranks: Annotated[
        int | None,
        options.count("Ranks that will share the machine (default: one for each GPU or core)"),
    ] = None,
    out: Annotated[Path, typer.Option(help="File to write")] = Path("cluster.toml"),
    budget: Annotated[float, typer.Option(help="Seconds to spend at most")] = 45.0,
) -> None:
    """Measure this machine: matrix products, memory, collectives, with all ranks busy at once.

    The file says what was measured and can be edited; `shardstage plan --cluster cluster.toml` reads it.

    [bold]Example[/]   shardstage probe --ranks 4 --out laptop.toml
    """
    require_folder(out)  # not after a minute of measuring
    cluster = probe_machine(ranks or num_default_ranks(), budget_s=budget)
    save(cluster, out)
    typer.echo(cluster.to_toml())
    typer.echo(f"written to {out}: shardstage plan --cluster {out}")
