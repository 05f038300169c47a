"""Finds which rank ended a job, and says so.

When one rank dies, its peers die of a lost connection within milliseconds, so the first exit that is seen is
seldom the cause. Evidence is weighed in this order, the earliest first within a line:

    died      a signal, an exit code, an exception that is not about a peer
    hung      some ranks timed out while waiting, this one was still running and not waiting
    left      finished normally while the others still wanted to talk to it
    victim    an exception about a peer: nothing better is known
"""

from __future__ import annotations

import pickle
import re
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shardstage.errors import RankFailedError, ShardstageError

__all__ = ["ExceptionReport", "RankEnd", "failure_of_job", "last_lines", "report_exception"]

Kind = Literal["died", "timed_out", "lost_peer"]

NUM_LAST_LINES = 12

_MAX_TEXT_CHARS = 8_000
_MAX_PICKLE_BYTES = 24_000
"""Both together stay below the 64 KiB that a Linux pipe takes without a reader (pipe(7))."""

# What gloo, NCCL, TCPStore and our process group say when a peer is gone, or does not come.
_LOST_PEER = re.compile(
    r"connection (reset|closed|refused|was closed)|broken pipe|socket (was )?closed|connection abort"
    r"|remote process exited|failed to recv",
    re.IGNORECASE,
)
_TIMED_OUT = re.compile(
    r"timed out waiting|timed out after \d+ ?ms|(connect|wait|socket|operation) timeout|did not arrive",
    re.IGNORECASE,
)
_WAITING_FRAME = re.compile(r"torch/distributed/|shardstage/runtime/(process_group|shared_|gloo_|transport)")
_STACK_TITLE = "Stack (most recent call first):"


@dataclass(frozen=True, kw_only=True)
class ExceptionReport:
    """The exception that ended a rank, as its launcher receives it; ``raised_s`` is wall clock."""

    raised_s: float
    type_name: str
    message: str
    hint: str | None
    kind: Kind
    pickled_error: bytes | None
    """A pickled ShardstageError, empty if it cannot travel; None for every other exception."""


@dataclass(frozen=True, kw_only=True)
class RankEnd:
    """How one rank ended; ``exit_code`` is minus the signal, or None if it had to be stopped."""

    rank: int
    exit_code: int | None
    ended_s: float
    report: ExceptionReport | None
    log: Path
    log_lines: tuple[str, ...]


def report_exception(error: BaseException) -> ExceptionReport:
    """What a rank tells its launcher about the exception that ends it."""
    message = error.message if isinstance(error, ShardstageError) else str(error)
    return ExceptionReport(
        raised_s=time.time(),
        type_name=type(error).__name__,
        message=message[:_MAX_TEXT_CHARS],
        hint=error.hint if isinstance(error, ShardstageError) else None,
        kind=_kind_of(error),
        pickled_error=_pickled(error) if isinstance(error, ShardstageError) else None,
    )


def failure_of_job(ends: Sequence[RankEnd]) -> ShardstageError | None:
    """The error to raise for a job whose ranks ended so; None if all ranks finished.

    A ShardstageError that a rank raised comes back itself, message and hint intact; anything else is a
    RankFailedError.
    """
    failed = [end for end in ends if end.exit_code]
    died = [end for end in failed if _kind_of_end(end) == "died"]
    if died:
        return _died(min(died, key=_time_s), ends)
    timed_out = [end for end in failed if _kind_of_end(end) == "timed_out"]
    still_running = [end for end in ends if end.exit_code is None]
    if timed_out and still_running:
        return _hung(still_running, min(timed_out, key=_time_s))
    finished = [end for end in ends if end.exit_code == 0]
    if failed and finished:
        return _left(min(finished, key=_time_s), min(failed, key=_time_s))
    if failed:
        return _died(min(timed_out or failed, key=_time_s), ends)
    return None if not still_running else _hung(still_running, None)


def last_lines(log: Path, num_lines: int = NUM_LAST_LINES) -> tuple[str, ...]:
    """The last lines of ``log``, or the last stack that a hung rank was made to print there."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 64_000))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ()
    lines = [line.rstrip() for line in lines if line.strip()]
    if _STACK_TITLE in lines[-200:]:
        start = len(lines) - 1 - lines[::-1].index(_STACK_TITLE)
        return tuple(lines[start : start + num_lines])
    return tuple(lines[-num_lines:])


def _pickled(error: ShardstageError) -> bytes:
    try:
        pickled = pickle.dumps(error)
    except Exception:  # whatever a user's subclass refers to
        return b""
    return pickled if len(pickled) <= _MAX_PICKLE_BYTES else b""


def _kind_of(error: BaseException) -> Kind:
    for cause in _chain(error):
        if isinstance(cause, (RuntimeError, RankFailedError)):  # torch's Dist…Error are RuntimeErrors
            if _TIMED_OUT.search(str(cause)):
                return "timed_out"
            if isinstance(cause, RankFailedError) or _LOST_PEER.search(str(cause)):
                return "lost_peer"
    return "died"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _kind_of_end(end: RankEnd) -> Kind:
    if end.report is not None:
        return end.report.kind
    if end.exit_code == -signal.SIGABRT:  # native code gave up: NCCL's watchdog, or a gloo thread
        text = "\n".join(end.log_lines)
        if _LOST_PEER.search(text):
            return "lost_peer"
        if _TIMED_OUT.search(text):  # "Watchdog caught collective operation timeout"
            return "timed_out"
    return "died"


def _time_s(end: RankEnd) -> float:
    return end.report.raised_s if end.report else end.ended_s


def _died(cause: RankEnd, ends: Sequence[RankEnd]) -> ShardstageError:
    report = cause.report
    same = [end for end in ends if report and end.report and _headline(end.report) == _headline(report)]
    everywhere = f" (the same on all {len(ends)} ranks)" if len(same) == len(ends) > 1 else ""
    if report is not None and report.pickled_error is not None:
        error = _restored(report)
        if not everywhere and len(ends) > 1:
            error.add_note(f"raised on rank {cause.rank} of {len(ends)}")
        return error
    how = _headline(report) if report else _exit_in_words(cause.exit_code or 0)
    return _rank_failed(cause, f"rank {cause.rank} of {len(ends)} {how}{everywhere}", hint=_hint(cause))


def _hung(still_running: Sequence[RankEnd], waiter: RankEnd | None) -> RankFailedError:
    """Name the ranks that are not themselves waiting in a collective; all, if each waits for another."""
    suspects = [end for end in still_running if not _is_waiting(end)] or list(still_running)
    names = " and ".join(f"rank {end.rank}" for end in suspects)
    if waiter is None or waiter.report is None:
        return _rank_failed(suspects[0], f"{names} did not finish in time")
    line = waiter.report.message.splitlines()[0]
    return _rank_failed(suspects[0], f"{names} hung: rank {waiter.rank} waited in vain ({line})")


def _left(finished: RankEnd, victim: RankEnd) -> RankFailedError:
    sentence = f"rank {finished.rank} finished while rank {victim.rank} was still waiting for it"
    return _rank_failed(victim, f"{sentence}: the ranks diverged")


def _is_waiting(end: RankEnd) -> bool:
    return any(_WAITING_FRAME.search(line) for line in end.log_lines)


def _rank_failed(end: RankEnd, sentence: str, *, hint: str | None = None) -> RankFailedError:
    lines = "".join(f"\n  | {line}" for line in end.log_lines)
    told = f"\nlast lines of rank {end.rank} ({end.log}):{lines}" if lines else ""
    return RankFailedError(sentence + told, hint=hint or f"less {end.log}")


def _headline(report: ExceptionReport) -> str:
    first_line = (report.message.splitlines() or [""])[0]
    return f"raised {report.type_name}: {first_line}"


def _exit_in_words(exit_code: int) -> str:
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    try:
        return f"was killed by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"was killed by signal {-exit_code}"


def _hint(end: RankEnd) -> str | None:
    if end.exit_code == -signal.SIGKILL:
        return "dmesg | grep -i 'out of memory'   # SIGKILL from nobody is usually the kernel out of memory"
    return None


def _restored(report: ExceptionReport) -> ShardstageError:
    try:
        error = pickle.loads(report.pickled_error or b"")
    except Exception:  # a user's subclass that cannot be rebuilt: its words still can
        error = None
    return error if isinstance(error, ShardstageError) else ShardstageError(report.message, hint=report.hint)
