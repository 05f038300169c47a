"""``guarded_stdout``: a reader that left ends a verb quietly, a full disk with one line; neither with a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Final, TextIO, cast

from shardstage.errors import ConfigError

__all__ = ["EXIT_CLOSED_PIPE", "guarded_stdout"]

EXIT_CLOSED_PIPE: Final = 141
"""As of programs that SIGPIPE ends: 128 + 13. The signal itself would end a run whose rank closed a socket, too."""


@contextmanager
def guarded_stdout() -> Iterator[None]:
    """While entered, and when it is left, ``sys.stdout`` that cannot be written raises ``ConfigError``, a closed pipe ``SystemExit``.

    Whoever writes: rich and click have answers of their own to an ``OSError``, and the interpreter has a third when it flushes at its end.
    What was raised already keeps its place.
    """
    kept = sys.stdout
    with (
        nullcontext(kept) if kept else Path(os.devnull).open("w", encoding="utf-8") as stream
    ):  # `>&-` leaves none
        guarded = _Guarded(stream)
        sys.stdout = cast(TextIO, guarded)
        try:
            yield
        except BaseException:
            with suppress(ConfigError, SystemExit):
                guarded.flush()
            raise
        else:
            guarded.flush()
        finally:
            sys.stdout = kept


class _Guarded:
    """A stream that is given up once it cannot be written: every later attempt raises the same, as click tries it out and tells nobody."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._loss: ConfigError | SystemExit | None = None

    def write(self, text: str) -> int:
        with self._giving_up():
            return self._stream.write(text)

    def flush(self) -> None:
        with self._giving_up():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextmanager
    def _giving_up(self) -> Iterator[None]:
        if self._loss is not None:
            raise self._loss
        try:
            yield
        except OSError as error:
            _empty(self._stream)
            self._loss = _as_loss(error)
            raise self._loss from error


def _empty(stream: TextIO) -> None:
    """What the stream still holds goes nowhere: the interpreter would fail to write it at its end."""
    with suppress(OSError):  # of a stream without a descriptor
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _as_loss(error: OSError) -> ConfigError | SystemExit:
    if isinstance(error, BrokenPipeError):
        return SystemExit(EXIT_CLOSED_PIPE)
    return ConfigError(
        f"standard output cannot be written: {error.strerror or error}", hint="df -h says which disk is full"
    )
