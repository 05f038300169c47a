"""Options that several verbs have, in the same words: help reads alike everywhere.

A verb that reads a run file has them without a default: what was not typed is the file's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final

import typer

__all__ = [
    "ClusterName",
    "Data",
    "GivenBatch",
    "GivenModel",
    "GivenPlan",
    "GivenSequence",
    "Model",
    "Plan",
    "RunFile",
    "count",
    "typed",
]


def count(help: str) -> Any:
    """An option that is a number of things, at least 1."""
    return typer.Option(callback=_at_least_one, help=help)


def _at_least_one(number: int | None) -> int | None:
    if number is not None and number < 1:
        raise typer.BadParameter(f"{number} is less than 1")
    return number


_MODEL: Final = typer.Option(help="Built-in name, Hugging Face config or folder, or module:factory")
_PLAN: Final = typer.Option(help='"auto", a shorthand such as "dp=2,tp=2", or a plan file')

Model = Annotated[str, _MODEL]
GivenModel = Annotated[str | None, _MODEL]
Plan = Annotated[str, _PLAN]
GivenPlan = Annotated[str | None, _PLAN]
GivenBatch = Annotated[int | None, count("Samples of a step, over all ranks")]
GivenSequence = Annotated[int | None, count("Tokens of a sample")]

ClusterName = Annotated[
    str, typer.Option(help='Preset and size such as "h100:512", a cluster file, or "local"')
]
Data = Annotated[list[str] | None, typer.Option(help="Text files or folders (default: Python's own sources)")]
RunFile = Annotated[
    Path | None, typer.Option("--run", "--run-file", help="Run file, which the other options override")
]


def typed(options: dict[str, Any]) -> dict[str, Any]:
    """Those that somebody typed."""
    return {name: value for name, value in options.items() if value is not None}
