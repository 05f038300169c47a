"""The first lines of a rank that ``launch`` started: find the entry, run it, tell the launcher how it ended.

It imports no torch: a rank pays for what its entry imports and no more.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import os
import pickle
import signal
import sys
import threading
import traceback
from multiprocessing import spawn
from typing import Any, TextIO, cast

from shardstage.errors import ShardstageError
from shardstage.runtime.environment import (
    LAUNCHER_VARIABLE,
    RankEnvironment,
    detect_environment,
    end_with_parent,
    leave_world,
)
from shardstage.runtime.failure import report_exception
from shardstage.runtime.terminal import Lossy

__all__ = ["EXIT_REFUSED", "pack_entry", "run_rank"]

EXIT_REFUSED = 2
"""Exit code of a rank that raised a ShardstageError, as of the command line."""


def pack_entry(entry: Any, args: tuple[Any, ...]) -> bytes:
    """``entry`` and ``args`` as ``run_rank`` reads them; raises what pickle raises if they cannot travel."""
    call = pickle.dumps((entry, args))
    preparation = spawn.get_preparation_data("rank")
    wanted = {"sys_path", "sys_argv", "dir"}
    if b"__main__" in call:  # only then does the launcher's own script have to be imported again
        wanted |= {"init_main_from_name", "init_main_from_path"}
    return pickle.dumps(({key: value for key, value in preparation.items() if key in wanted}, call))


def run_rank(packed_fd: int, report_fd: int, log_fd: int) -> None:
    """Run the packed entry as the rank that the environment names.

    Tracebacks go to ``log_fd`` and not to stderr, which is the terminal for rank 0: the launcher shows the
    one that matters, once.
    """
    end_with_parent(int(os.environ[LAUNCHER_VARIABLE]))
    faulthandler.enable(log_fd)
    faulthandler.register(signal.SIGUSR1, log_fd, all_threads=False)  # how a hung rank is asked where it is
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a killed rank loses no whole line
    sys.stdout = cast(TextIO, Lossy(sys.stdout))
    environment = detect_environment()
    assert environment is not None and environment.source == "shardstage"
    exit_code = _run_and_report(environment, packed_fd, report_fd, log_fd)
    if exit_code == 0:  # otherwise at once: what is registered could wait for peers that are gone
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as the interpreter would
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    # The way multiprocessing ends its children too. Unloading torch module by module would take 0.5 s of a core.
    os._exit(exit_code)


def _run_and_report(environment: RankEnvironment, packed_fd: int, report_fd: int, log_fd: int) -> int:
    try:
        entry, args = _unpack(packed_fd)
        entry(environment, *args)
        if "torch.distributed" in sys.modules:
            leave_world()
        return 0
    except SystemExit as stop:
        return _exit_code(stop)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.write(report_fd, pickle.dumps(report_exception(error)))
        with contextlib.suppress(OSError):
            os.write(log_fd, "".join(traceback.format_exception(error)).encode(errors="replace"))
        return EXIT_REFUSED if isinstance(error, ShardstageError) else 1


def _exit_code(stop: SystemExit) -> int:
    """The code that the interpreter would end with; like it, print a code that is a text."""
    if stop.code is None or isinstance(stop.code, int):
        return stop.code or 0
    print(stop.code, file=sys.stderr)
    return 1


def _unpack(packed_fd: int) -> tuple[Any, tuple[Any, ...]]:
    # All ranks share one open file, so read at an offset of one's own.
    packed = os.pread(packed_fd, os.fstat(packed_fd).st_size, 0)
    os.close(packed_fd)
    preparation, call = pickle.loads(packed)
    spawn.prepare(preparation)
    entry, args = pickle.loads(call)
    return entry, args
