"""``stdout_to_stderr``: what compiled code prints does not end up in a command's output."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

__all__ = ["stdout_to_stderr"]


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Sends what is written to file descriptor 1 to descriptor 2; does nothing where one of them is closed.

    HiGHS as of scipy 1.17 prints a line of debugging when it mends a solution (once in some hundred of our problems), whatever its
    options say, and a plan on standard output would not be read back with that line in it.
    """
    try:
        kept = os.dup(1)
    except OSError:
        yield
        return
    try:
        _flush()
        with contextlib.suppress(OSError):
            os.dup2(2, 1)
        yield
    finally:
        _flush()
        os.dup2(kept, 1)
        os.close(kept)


def _flush() -> None:
    """Empties the buffer of the C library, which writes to the descriptor only when it is full or stdout is a terminal."""
    with contextlib.suppress(OSError, TypeError, AttributeError):  # no C library by that name outside POSIX
        ctypes.CDLL(None).fflush(None)
