"""What a rank writes to the terminal: copied into a file as well, without taking the terminal from it, and lost rather than fatal."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import termios
import threading
import tty
from types import TracebackType
from typing import Any, TextIO

__all__ = ["Lossy", "Tee"]

_DRAIN_S = 1.0


class Tee:
    """A descriptor to write to, ``write_fd``; everything written goes to ``stream`` and to the file
    ``log_fd``.

    It is a terminal if ``stream`` is one, of the same size, so that a progress bar is still drawn.
    """

    def __init__(self, stream: TextIO | None, log_fd: int) -> None:
        self._to_fd = None if stream is None else stream.fileno()
        self._log_fd = log_fd
        if self._to_fd is not None and os.isatty(self._to_fd):
            self._read_fd, self.write_fd = os.openpty()
            tty.setraw(self.write_fd)  # the real terminal turns \n into \r\n, once
            _copy_size(self._to_fd, self.write_fd)
        else:
            self._read_fd, self.write_fd = os.pipe()
        self._is_open = True
        self._thread = threading.Thread(target=self._copy, name="tee", daemon=True)

    def __enter__(self) -> Tee:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close_write_end()
        self.drain()
        if not self._thread.is_alive():
            os.close(self._read_fd)

    def close_write_end(self) -> None:
        """Close this process's ``write_fd`` once the rank has a copy: input then ends with the rank."""
        if self._is_open:
            self._is_open = False
            os.close(self.write_fd)

    def drain(self) -> None:
        """Wait until everything that was written has been copied; the writer has ended."""
        self._thread.join(_DRAIN_S)

    def _copy(self) -> None:
        while True:
            try:
                written = os.read(self._read_fd, 65_536)
            except OSError:  # EIO: the last writer of a pseudo terminal has closed it
                return
            if not written:
                return
            for fd in (self._to_fd, self._log_fd):
                if fd is not None:
                    with contextlib.suppress(
                        OSError
                    ):  # a closed terminal or full disk must not stop the rank
                        os.write(fd, written)


class Lossy:
    """A stream for what a rank may lose: a reader that left or a full disk must not stop the run. Its launcher will say it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _copy_size(from_fd: int, to_fd: int) -> None:
    with contextlib.suppress(OSError):
        size = fcntl.ioctl(from_fd, termios.TIOCGWINSZ, struct.pack("4H", 0, 0, 0, 0))
        fcntl.ioctl(to_fd, termios.TIOCSWINSZ, size)
