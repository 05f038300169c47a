"""Starts the ranks of this host, watches them, and ends them together.

    launcher ──Popen──► rank 0   terminal: stdout as it is, stderr through a tee into rank0.err
       │      ──Popen──► rank k   rank<k>.out, rank<k>.err
       └─ listens on a port that the system chose: the store in which the ranks meet

The start is torch's own elastic launch in small, for four reasons: a thread count must be in the environment
before a rank imports torch; the ranks' imports overlap the launcher's; the exception that came first is found
by times finer than a second and after the others had time to speak; and every rank leads a process group, so
that Ctrl-C reaches the launcher alone and what a rank started ends with it.
"""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from shardstage.errors import ConfigError
from shardstage.runtime.environment import LAUNCHER_VARIABLE, RankEnvironment, num_usable_cores
from shardstage.runtime.failure import ExceptionReport, RankEnd, failure_of_job, last_lines
from shardstage.runtime.rank_entry import pack_entry
from shardstage.runtime.terminal import Tee

__all__ = ["launch", "run_as_rank"]

_POLL_S = 0.05
_SETTLE_S = 0.5
"""How long the others may still speak after the first failure: a reset connection takes milliseconds."""

_STACK_S = 0.3
"""How long a hung rank gets to print its stack; the signal handler is native code and writes at once."""

_KILL_S = 2.0
"""How long SIGKILL may take; with the default grace a stop ends within 4 s whatever the ranks do."""

_BOOT = """
import sys
sys.path[:] = sys.argv[1].split(sys.argv[2])
from shardstage.runtime.rank_entry import run_rank
run_rank(*map(int, sys.argv[3:]))
"""
"""A rank looks for modules where its launcher does, from the first import on."""


def launch(
    entry: Callable[..., None],
    args: tuple[Any, ...],
    *,
    num_ranks: int,
    log_dir: Path,
    threads_per_rank: int | None = None,
    env: Mapping[str, str] | None = None,
    timeout_s: float = math.inf,
    stop_grace_s: float = 2.0,
) -> None:
    """Run ``entry(environment, *args)`` in ``num_ranks`` new processes of this host and return when all have
    finished.

    ``entry`` is a top-level function. ``threads_per_rank`` defaults to OMP_NUM_THREADS, else an equal share
    of the cores. A job longer than ``timeout_s`` is ended. When the job ends early every rank gets SIGTERM,
    and SIGKILL after ``stop_grace_s``; no process stays behind, even if this one is killed.

    Raises the ShardstageError that a rank raised; RankFailedError, naming the rank that was the cause, how it
    ended and the last lines of its log; KeyboardInterrupt on Ctrl-C; SystemExit(128 + signal) on SIGTERM and
    SIGHUP.
    """
    if num_ranks < 1:
        raise ConfigError(f"{num_ranks} ranks cannot be started: a job has at least one", hint="--ranks 1")
    with contextlib.ExitStack() as stack:
        logs = stack.enter_context(_open_logs(log_dir, num_ranks))
        packed = stack.enter_context(_shared_file(_packed(entry, args)))
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=4 * num_ranks))
        stop_signal = stack.enter_context(_stop_signals())
        base = _rank_variables(num_ranks, listener.getsockname()[1], threads_per_rank, env or {})
        hosting = stack.enter_context(ThreadPoolExecutor(1, "store"))
        ranks: list[_Rank] = []
        try:
            for rank in range(num_ranks):
                ranks.append(stack.enter_context(_start_rank(rank, base, packed, logs[rank])))
            store = hosting.submit(_host_store, listener)
            ends = _watch(ranks, store, stop_signal, time.monotonic() + timeout_s)
        finally:
            _stop(ranks, stop_grace_s, stop_signal)
        del store  # not before the ranks, which may still ask it
    if stop_signal.signum == signal.SIGINT:
        raise KeyboardInterrupt
    if stop_signal.signum is not None:
        raise SystemExit(128 + stop_signal.signum)
    failure = failure_of_job(ends)
    if failure is not None:
        raise failure


def run_as_rank(entry: Callable[..., None], args: tuple[Any, ...], environment: RankEnvironment) -> None:
    """Run ``entry`` in this process, which torchrun or Slurm started; torchrun is told of an exception."""
    if environment.source != "torchrun":
        entry(environment, *args)
        return
    from torch.distributed.elastic.multiprocessing.errors import record

    record(entry)(environment, *args)


@dataclass(kw_only=True)
class _Logs:
    """The files of one rank; ``out`` is None where stdout is the launcher's own."""

    path: Path
    out: int | None
    err: int


@dataclass(kw_only=True)
class _Rank:
    """A started rank, and how it ended once it has."""

    rank: int
    popen: subprocess.Popen[bytes]
    report_fd: int
    log: Path
    tee: Tee | None
    ended_s: float | None = None
    report: ExceptionReport | None = None

    def poll(self) -> int | None:
        """Its exit code, or None while it runs; what the rank itself started ends with it."""
        exit_code = self.popen.poll()
        if exit_code is not None and self.ended_s is None:
            self.ended_s = time.time()
            self.report = _read_report(self.report_fd)
            self.signal_group(signal.SIGKILL)
        return exit_code

    def signal_group(self, signum: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.popen.pid, signum)

    def end(self) -> RankEnd:
        exit_code = self.poll()
        if exit_code is not None and self.tee is not None:
            self.tee.drain()
        return RankEnd(
            rank=self.rank,
            exit_code=exit_code,
            ended_s=self.ended_s or time.time(),
            report=self.report,
            log=self.log,
            log_lines=last_lines(self.log) or last_lines(self.log.with_suffix(".out")),
        )


@dataclass(kw_only=True)
class _StopSignal:
    """The first signal that asked the launcher to stop, and how many came."""

    signum: int | None = None
    count: int = 0

    def note(self, signum: int, _frame: FrameType | None) -> None:
        self.signum = self.signum or signum
        self.count += 1


def _packed(entry: Callable[..., None], args: tuple[Any, ...]) -> bytes:
    try:
        return pack_entry(entry, args)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"{getattr(entry, '__qualname__', entry)} and its arguments cannot be sent to the ranks: {error}",
            hint="def entry(environment, *args): ...   # at the top level of a module",
        ) from error


@contextlib.contextmanager
def _open_logs(log_dir: Path, num_ranks: int) -> Iterator[list[_Logs]]:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    logs: list[_Logs] = []
    try:
        try:
            log_dir.mkdir(parents=True, exist_ok=True)
            for rank in range(num_ranks):
                path = log_dir / f"rank{rank}.err"
                out = os.open(path.with_suffix(".out"), flags, 0o644) if rank > 0 else None
                logs.append(_Logs(path=path, out=out, err=os.open(path, flags, 0o644)))
        except OSError as error:
            reason = error.strerror or str(error)
            raise ConfigError(
                f"the ranks' logs cannot be written to {log_dir}: {reason}",
                hint=f"ls -ld {log_dir}; df -h {log_dir}",
            ) from error
        yield logs
    finally:
        for log in logs:
            for fd in (log.out, log.err):
                if fd is not None:
                    os.close(fd)


@contextlib.contextmanager
def _shared_file(content: bytes) -> Iterator[int]:
    """A descriptor of a file without a name that holds ``content``; in memory where the system can."""
    if hasattr(os, "memfd_create"):
        file = os.fdopen(os.memfd_create("shardstage"), "w+b")
    else:
        file = tempfile.TemporaryFile()
    with file:
        file.write(content)
        file.flush()
        yield file.fileno()


@contextlib.contextmanager
def _stop_signals() -> Iterator[_StopSignal]:
    """Note the signals that mean stop, unless the launcher was told to ignore them (nohup)."""
    noted = _StopSignal()
    previous: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(signum) is not signal.SIG_IGN:
                previous[signum] = signal.signal(signum, noted.note)
    try:
        yield noted
    finally:
        for signum, action in previous.items():
            signal.signal(signum, action)


def _rank_variables(
    num_ranks: int, port: int, threads_per_rank: int | None, env: Mapping[str, str]
) -> dict[str, str]:
    """The environment of every rank, all but its number."""
    variables = {**os.environ, **env}
    threads = threads_per_rank or variables.get("OMP_NUM_THREADS") or max(1, num_usable_cores() // num_ranks)
    variables |= {
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(threads),
        LAUNCHER_VARIABLE: str(os.getpid()),
    }
    # gloo would listen on the address that the host's name resolves to, which may be public or none at all.
    variables.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    return variables


@contextlib.contextmanager
def _start_rank(rank: int, base: Mapping[str, str], packed_fd: int, log: _Logs) -> Iterator[_Rank]:
    with contextlib.ExitStack() as stack:
        tee = stack.enter_context(Tee(sys.__stderr__, log.err)) if rank == 0 else None
        report_fd, report_write_fd = os.pipe()
        stack.callback(os.close, report_fd)
        fds = (packed_fd, report_write_fd, log.err)
        search_path = (os.pathsep.join(sys.path), os.pathsep)
        try:
            popen = subprocess.Popen(
                [sys.executable, *_interpreter_flags(), "-c", _BOOT, *search_path, *map(str, fds)],
                env={**base, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.DEVNULL,
                stdout=log.out,
                stderr=log.err if tee is None else tee.write_fd,
                pass_fds=fds,
                process_group=0,
            )
        finally:
            os.close(report_write_fd)
            if tee is not None:
                tee.close_write_end()
        yield _Rank(rank=rank, popen=popen, report_fd=report_fd, log=log.path, tee=tee)


def _interpreter_flags() -> list[str]:
    """Warning filters and -X options of this interpreter."""
    options = [f"-X{key}" if value is True else f"-X{key}={value}" for key, value in sys._xoptions.items()]
    return options + [f"-W{option}" for option in sys.warnoptions]


def _host_store(listener: socket.socket) -> object:
    """The store in which the ranks meet, on the listening socket whose port they were given already.

    On a thread and after the start of the ranks: their import of torch and this one overlap, and a stop need not
    wait for it. Who connects early waits in the backlog.
    """
    from torch.distributed import TCPStore

    host, port = listener.getsockname()
    return TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def _watch(
    ranks: Sequence[_Rank], store: Future[object], stop_signal: _StopSignal, deadline_s: float
) -> list[RankEnd]:
    """Wait until all ranks have ended, or one has failed and the others could say why, or a signal came."""
    until_s = deadline_s
    while stop_signal.signum is None and any(rank.poll() is None for rank in ranks):
        now_s = time.monotonic()
        if until_s == deadline_s and any(rank.poll() for rank in ranks):
            until_s = min(deadline_s, now_s + _SETTLE_S)
        if now_s >= until_s:
            _ask_for_stacks(ranks)
            break
        if store.done():
            store.result()  # raises what kept the launcher from hosting it
        time.sleep(_POLL_S)
    return [rank.end() for rank in ranks]


def _ask_for_stacks(ranks: Sequence[_Rank]) -> None:
    running = [rank for rank in ranks if rank.poll() is None]
    for rank in running:
        rank.popen.send_signal(signal.SIGUSR1)
    time.sleep(_STACK_S)


def _stop(ranks: Sequence[_Rank], grace_s: float, stop_signal: _StopSignal) -> None:
    """End every rank and what it started; a second Ctrl-C ends the grace."""
    running = [rank for rank in ranks if rank.poll() is None]
    for rank in running:
        rank.signal_group(signal.SIGTERM)
        rank.signal_group(signal.SIGCONT)  # a rank that was stopped (SIGSTOP) cannot end otherwise
    until_s = time.monotonic() + grace_s
    while any(rank.poll() is None for rank in running):
        if time.monotonic() > until_s or stop_signal.count > 1:
            break
        time.sleep(_POLL_S)
    for rank in running:
        rank.signal_group(signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the kernel: nothing can end it
            rank.popen.wait(_KILL_S)


def _read_report(report_fd: int) -> ExceptionReport | None:
    """What the ended rank wrote, None if it could not; a process it forked may still hold the pipe open."""
    written = b""
    while select.select([report_fd], [], [], 0)[0]:
        part = os.read(report_fd, 65_536)
        if not part:
            break
        written += part
    try:
        report = pickle.loads(written) if written else None
    except (pickle.UnpicklingError, EOFError):
        return None
    return report if isinstance(report, ExceptionReport) else None
