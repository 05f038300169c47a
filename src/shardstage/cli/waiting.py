"""``waiting``: while something long is done, somebody who waits is told of what, and after a while why it takes so long; ``capturing`` a
model is such."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from rich.console import Console
from rich.status import Status

__all__ = ["capturing", "waiting"]

PATIENCE_S: Final = 10.0
"""Seconds without a word: most captures and rehearsals take less."""


@contextmanager
def capturing(
    console: Console,
    model: str,
    *,
    sequence: int,
    is_kept: bool = False,
    then: str = "",
) -> Iterator[None]:
    """``is_kept`` says that the capture is cached, ``then`` what is done in the same go."""
    kept = "; cached afterwards" if is_kept else ""
    why = f"minutes where a model loops over its {sequence:,} tokens op by op, seconds else{kept}"
    with waiting(console, f"capturing {model}{then}", why):
        yield


@contextmanager
def waiting(console: Console, doing: str, why: str) -> Iterator[Status]:
    """Says so while entered: in a terminal by the status, elsewhere by one line on stderr once it takes longer than ``PATIENCE_S``."""
    stderr = sys.stderr  # a capture puts another in its place
    with console.status(doing) as status:

        def explain() -> None:
            if console.is_terminal:
                status.update(f"{doing} ({why})")
            else:
                print(f"still {doing}: {why}", file=stderr, flush=True)

        timer = threading.Timer(PATIENCE_S, explain)
        timer.daemon = True
        timer.start()
        try:
            yield status
        finally:
            timer.cancel()
