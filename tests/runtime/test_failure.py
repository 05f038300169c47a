from __future__ import annotations

import signal
from pathlib import Path

from shardstage.errors import DataError, RankFailedError, ShardstageError
from shardstage.runtime.failure import RankEnd, failure_of_job, last_lines, report_exception

RESET = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4242")
TIMEOUT = RuntimeError(
    "[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1000ms for recv operation"
)


def _end(
    rank: int,
    exit_code: int | None,
    *,
    error: BaseException | None = None,
    ended_s: float = 0.0,
    lines: tuple[str, ...] = (),
) -> RankEnd:
    return RankEnd(
        rank=rank,
        exit_code=exit_code,
        ended_s=ended_s,
        report=None if error is None else report_exception(error),
        log=Path(f"logs/rank{rank}.err"),
        log_lines=lines,
    )


def _sentence(*ends: RankEnd) -> str:
    failure = failure_of_job(ends)
    assert isinstance(failure, RankFailedError)
    return failure.message.splitlines()[0]


def test_a_job_whose_ranks_all_finished_did_not_fail() -> None:
    assert failure_of_job([_end(0, 0), _end(1, 0)]) is None


def test_a_signal_is_the_cause_even_if_a_lost_connection_was_seen_first() -> None:
    ends = (_end(0, 1, error=RESET), _end(1, -9, ended_s=1e12))
    assert _sentence(*ends) == "rank 1 of 2 was killed by SIGKILL"


def test_of_two_deaths_the_earlier_is_the_cause() -> None:
    ends = (_end(0, -11, ended_s=2.0), _end(1, 3, ended_s=1.0), _end(2, None))
    assert _sentence(*ends) == "rank 1 of 3 ended with exit code 3"


def test_an_unknown_signal_is_told_by_its_number() -> None:
    assert _sentence(_end(0, -60)) == "rank 0 of 1 was killed by signal 60"


def test_the_same_exception_on_all_ranks_is_told_once() -> None:
    ends = [_end(rank, 1, error=KeyError("wte")) for rank in range(3)]
    assert _sentence(*ends) == "rank 0 of 3 raised KeyError: 'wte' (the same on all 3 ranks)"


def test_native_code_that_gave_up_because_of_a_peer_is_a_victim() -> None:
    victim = _end(
        0, -signal.SIGABRT, ended_s=1.0, lines=("terminate called", "what(): Connection reset by peer")
    )
    assert _sentence(victim, _end(1, 5, ended_s=2.0)) == "rank 1 of 2 ended with exit code 5"
    cause = _end(0, -signal.SIGABRT, ended_s=1.0, lines=("terminate called", "gloo::EnforceNotMet"))
    assert _sentence(cause, _end(1, 1, error=RESET)) == "rank 0 of 2 was killed by SIGABRT"


def test_an_error_about_a_peer_is_known_behind_the_error_that_wraps_it() -> None:
    try:
        try:
            raise RESET
        except RuntimeError as error:
            raise DataError("batch 3 cannot be read") from error
    except DataError as error:
        wrapped = error
    assert _sentence(_end(0, 2, error=wrapped), _end(1, -9)) == "rank 1 of 2 was killed by SIGKILL"


def test_what_our_process_group_says_of_a_peer_yields_to_the_peer_itself() -> None:
    dead = RankFailedError("rank 1 (pid 7) is dead, while group rank 0 of 2 waited in all_reduce", hint="h")
    assert _sentence(_end(0, 2, error=dead), _end(1, 1, error=ValueError("nan"))) == (
        "rank 1 of 2 raised ValueError: nan"
    )
    alone = failure_of_job([_end(0, 2, error=dead), _end(1, 2, error=dead)])
    assert (str(alone), type(alone)) == (str(dead), RankFailedError)


def test_the_rank_that_is_not_itself_waiting_hung() -> None:
    waiting = _end(
        1, None, lines=('  File "/lib/torch/distributed/distributed_c10d.py", line 3015 in all_reduce',)
    )
    busy = _end(2, None, lines=('  File "train.py", line 9 in load', '  File "train.py", line 30 in main'))
    late = _end(0, 1, error=TIMEOUT)
    assert _sentence(late, waiting, busy).startswith("rank 2 hung: rank 0 waited in vain ([gloo")
    assert _sentence(late, waiting, waiting).startswith("rank 1 and rank 1 hung")
    failure = failure_of_job([late, waiting, busy])
    assert failure is not None and failure.hint == "less logs/rank2.err"
    assert "\nlast lines of rank 2 (logs/rank2.err):\n  |   File" in failure.message


def test_a_timeout_of_the_nccl_watchdog_points_at_the_rank_that_still_runs() -> None:
    abort = _end(
        0, -signal.SIGABRT, lines=("[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(",)
    )
    assert _sentence(abort, _end(1, None)) == "rank 1 did not finish in time"


def test_a_timeout_of_the_users_own_is_no_timeout_of_a_collective() -> None:
    error = TimeoutError("the server timed out waiting for tokens")
    assert _sentence(_end(0, 1, error=error), _end(1, None)).startswith("rank 0 of 2 raised TimeoutError")


def test_a_rank_that_finished_too_early_is_named_when_others_lost_it() -> None:
    assert _sentence(_end(0, 1, error=RESET), _end(1, 0)) == (
        "rank 1 finished while rank 0 was still waiting for it: the ranks diverged"
    )


def test_if_all_are_victims_the_first_is_named() -> None:
    assert _sentence(_end(0, 1, error=RESET), _end(1, 1, error=RESET)).startswith(
        "rank 0 of 2 raised RuntimeError"
    )


def test_an_error_too_large_for_the_pipe_keeps_its_words() -> None:
    report = report_exception(DataError("x" * 100_000, hint="h"))
    assert report.pickled_error == b""
    assert len(report.message) == 8_000
    error = failure_of_job([_end(0, 2, error=DataError("x" * 100_000, hint="h"))])
    assert isinstance(error, ShardstageError)
    assert error.hint == "h"


def test_last_lines_skip_empty_ones_and_prefer_a_stack(tmp_path: Path) -> None:
    log = tmp_path / "rank0.err"
    assert last_lines(log) == ()
    log.write_text("\n".join(f"line {i}\n" for i in range(40)))
    assert last_lines(log, 2) == ("line 38", "line 39")
    with log.open("a") as file:
        file.write("\nStack (most recent call first):\n  File a\n  File b\n  File c\n")
    assert last_lines(log, 3) == ("Stack (most recent call first):", "  File a", "  File b")
