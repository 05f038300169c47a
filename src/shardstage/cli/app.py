"""The verbs put together, and errors turned into one clear line and an exit code."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.markup import escape

from shardstage import __version__
from shardstage.cli.stdout import guarded_stdout
from shardstage.cli.wrapping import say
from shardstage.errors import ParityError, RankFailedError, ShardstageError

__all__ = ["run"]

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

_USAGE_ERROR: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
"""What a mistyped option raises: click's, or that of the copy of click which newer versions of typer bring."""

VERBS: Final = ("plan", "rehearse", "train", "prove", "probe", "calibrate", "report")
"""In the order of the help; each is a function of its name in a file of its name."""


def _flowing(text: str) -> str:
    """A docstring as help: paragraphs without the source's line ends, which no terminal shares."""
    paragraphs = [paragraph.splitlines() for paragraph in inspect.cleandoc(text).split("\n\n")]
    return "\n\n".join(" ".join([lines[0], *map(str.strip, lines[1:])]) for lines in paragraphs)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"shardstage {__version__}")
        raise typer.Exit


def _before_the_verb(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_show_version, help="Say which version this is"),
    ] = False,
) -> None:
    """Options that stand before any verb."""


def _app(verbs: Iterable[str]) -> typer.Typer:
    app = typer.Typer(
        name="shardstage",
        help="Make one PyTorch model run as one program on many devices: plan it, run it, prove it.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_before_the_verb)
    for name in verbs:
        verb = getattr(import_module(f"shardstage.cli.{name}"), name)
        app.command(help=_flowing(verb.__doc__ or ""))(verb)
    return app


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs a verb; returns the exit code. ``SHARDSTAGE_DEBUG=1`` lets errors through with their traceback."""
    if os.environ.get("SHARDSTAGE_DEBUG"):
        return _run_verb(arguments)
    try:
        code = _run_verb(arguments)
    except _USAGE_ERROR as error:
        error.show()
        return EXIT_BAD_INPUT
    except (KeyboardInterrupt, typer.Abort):
        code = EXIT_INTERRUPTED
    except ShardstageError as error:
        _show(error)
        return EXIT_FAILED if isinstance(error, ParityError | RankFailedError) else EXIT_BAD_INPUT
    if code == EXIT_INTERRUPTED:
        print("stopped", file=sys.stderr)
    return code


def _run_verb(arguments: Sequence[str] | None) -> int:
    typed = list(sys.argv[1:] if arguments is None else arguments)
    verbs = VERBS if not typed or typed[0] not in VERBS else typed[:1]  # the others need not be loaded
    with guarded_stdout():
        code = _app(verbs)(typed, prog_name="shardstage", standalone_mode=False)
    return code if isinstance(code, int) else 0


def _show(error: ShardstageError) -> None:
    console = Console(stderr=True, highlight=False, emoji=False)
    say(console, f"[bold red]error:[/] {escape(error.message)}")
    if error.hint is not None:
        console.print(f"[bold]hint:[/] {escape(error.hint)}", soft_wrap=True)
