"""Ranks are really started here, torch-free ones where torch is not the point: they take a tenth of a second."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.runtime import launch_entries as entries

from shardstage.errors import ConfigError, DataError, RankFailedError, ShardstageError
from shardstage.runtime.launch import launch

ROOT = Path(__file__).parents[2]


def test_every_rank_runs_the_entry_with_its_place_threads_and_environment(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    launch(
        entries.say_hello,
        (tmp_path,),
        num_ranks=3,
        log_dir=tmp_path / "new" / "logs",
        threads_per_rank=5,
        env={"COLOUR": "blue"},
    )
    hellos = [json.loads((tmp_path / f"hello{rank}.json").read_text()) for rank in range(3)]
    assert [hello["environment"]["rank"] for hello in hellos] == [0, 1, 2]
    for rank, hello in enumerate(hellos):
        place = hello["environment"]
        assert place == hello["detected"]
        assert (place["world_size"], place["local_rank"], place["local_world_size"]) == (3, rank, 3)
        assert place["source"] == "shardstage"
        assert (hello["threads"], hello["colour"]) == ("5", "blue")
        assert not hello["has_torch"], "a rank imports only what its entry needs"
    _assert_only_rank_0_reaches_the_terminal(tmp_path / "new" / "logs", capfd)


def _assert_only_rank_0_reaches_the_terminal(logs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shown = capfd.readouterr()
    assert shown.out == "out of rank 0\n"
    assert shown.err == "err of rank 0\n"
    assert (logs / "rank0.err").read_text() == "err of rank 0\n"
    assert (logs / "rank2.out").read_text() == "out of rank 2\n"
    assert (logs / "rank2.err").read_text() == "err of rank 2\n"


def test_ranks_meet_under_the_launcher_and_as_a_slurm_step(tmp_path: Path) -> None:
    launch(entries.compute_together, (tmp_path, _free_slurm_job()), num_ranks=2, log_dir=tmp_path)
    for rank in range(2):
        ours, slurm = json.loads((tmp_path / f"totals{rank}.json").read_text())
        assert ours[:3] == ["shardstage", 2, 3.0]
        assert slurm[:3] == ["slurm", 2, 3.0]


def _free_slurm_job() -> int:
    """A job number whose port nobody uses here."""
    for port in range(12_000 + os.getpid() % 10_000, 32_000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port - 12_000
    raise AssertionError("no free port")


def test_torchrun_starts_the_same_entry(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [*command, "-m", "tests.runtime.launch_entries", "rank", str(tmp_path)],
        cwd=ROOT,
        env=_environment(),
        check=True,
        capture_output=True,
        timeout=120,
    )
    for rank in range(2):
        assert json.loads((tmp_path / f"totals{rank}.json").read_text())[0][:3] == ["torchrun", 2, 3.0]


def test_a_killed_rank_is_named_and_not_the_ranks_that_lost_it(tmp_path: Path) -> None:
    with pytest.raises(RankFailedError) as failure:
        launch(entries.kill_itself_mid_collective, (1,), num_ranks=3, log_dir=tmp_path)
    assert failure.value.message.startswith("rank 1 of 3 was killed by SIGKILL\nlast lines of rank 1")
    assert "| about to be killed" in failure.value.message
    assert "out of memory" in (failure.value.hint or "")


def test_a_hung_rank_is_named_with_the_place_where_it_hangs(tmp_path: Path) -> None:
    with pytest.raises(RankFailedError) as failure:
        launch(entries.leave_the_collective, (1,), num_ranks=2, log_dir=tmp_path)
    assert failure.value.message.startswith("rank 1 hung: rank 0 waited in vain (")
    assert "in leave_the_collective" in failure.value.message


def test_an_exception_is_named_although_a_lost_connection_was_seen_before(tmp_path: Path) -> None:
    with pytest.raises(RankFailedError) as failure:
        launch(entries.raise_on_one, (2, tmp_path), num_ranks=3, log_dir=tmp_path)
    first_line, *rest = failure.value.message.splitlines()
    assert first_line == "rank 2 of 3 raised ValueError: the loss is NaN"
    assert "in raise_on_one" in "\n".join(rest)


def test_a_refusal_by_all_ranks_is_raised_once_and_shown_by_nobody_else(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError) as refusal:
        launch(entries.refuse_on_all, (), num_ranks=3, log_dir=tmp_path)
    assert (refusal.value.message, refusal.value.hint) == ("only 10 tokens", "seq_len = 4")
    assert capfd.readouterr() == ("", "")
    assert "only 10 tokens" in (tmp_path / "rank0.err").read_text(), "its traceback is in the log"


def test_a_refusal_that_cannot_be_rebuilt_keeps_its_words(tmp_path: Path) -> None:
    with pytest.raises(ShardstageError) as refusal:
        launch(entries.refuse_in_own_words, (), num_ranks=2, log_dir=tmp_path)
    assert (refusal.value.message, refusal.value.hint) == ("own words", "own hint")
    assert refusal.value.__notes__ == ["raised on rank 1 of 2"]


@pytest.mark.parametrize(("code", "exit_code", "last_line"), [(7, 7, ""), ("enough", 1, "| enough")])
def test_an_exit_code_is_reported(tmp_path: Path, code: int | str, exit_code: int, last_line: str) -> None:
    with pytest.raises(RankFailedError, match=f"rank 1 of 2 ended with exit code {exit_code}") as failure:
        launch(entries.exit_with, (code,), num_ranks=2, log_dir=tmp_path)
    assert last_line in failure.value.message


def test_an_exit_code_of_zero_is_a_normal_end(tmp_path: Path) -> None:
    launch(entries.exit_with, (0,), num_ranks=2, log_dir=tmp_path)


def test_what_a_finished_rank_started_ends_with_it(tmp_path: Path) -> None:
    launch(entries.leave_a_process, (tmp_path,), num_ranks=1, log_dir=tmp_path)
    _wait_until(lambda: not _is_running(int((tmp_path / "child0").read_text())))


def test_a_job_that_takes_too_long_is_ended_with_the_name_of_the_slow_ranks(tmp_path: Path) -> None:
    with pytest.raises(RankFailedError, match="rank 0 and rank 1 did not finish in time") as failure:
        launch(
            entries.sleep_stubbornly, (tmp_path,), num_ranks=2, log_dir=tmp_path, timeout_s=1, stop_grace_s=0
        )
    assert failure.value.hint


def test_an_entry_that_cannot_travel_is_refused_before_any_rank_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be sent to the ranks") as refusal:
        launch(lambda environment: None, (), num_ranks=2, log_dir=tmp_path)
    assert "top level" in (refusal.value.hint or "")


def test_a_job_without_ranks_or_without_a_place_for_its_logs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="0 ranks cannot be started"):
        launch(entries.refuse_on_all, (), num_ranks=0, log_dir=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"logs cannot be written to .*file/logs: Not a directory"):
        launch(entries.refuse_on_all, (), num_ranks=1, log_dir=tmp_path / "file" / "logs")


def test_no_process_survives_a_launcher_that_is_interrupted_terminated_or_killed(
    tmp_path: Path, launcher_in_a_terminal: subprocess.Popen[bytes]
) -> None:
    """Rank 1 ignores SIGTERM and has a child; by the third launch only the kernel can tell the ranks."""
    for attempt, signum in (
        ("interrupted", signal.SIGINT),
        ("terminated", signal.SIGTERM),
        ("killed", signal.SIGKILL),
    ):
        asleep = [_read_when_written(tmp_path / attempt / f"asleep{rank}.json") for rank in range(2)]
        assert [rank["is_terminal"] for rank in asleep] == [[True, True], [False, False]]
        assert asleep[0]["columns"] == 123
        launcher_in_a_terminal.send_signal(signum)
        for rank in asleep:
            _wait_until(lambda pid=rank["pid"]: not _is_running(pid))
        if signum == signal.SIGKILL:
            os.kill(
                asleep[1]["child"], signal.SIGKILL
            )  # `sleep` looks for no parent; a data loader's process does
        else:
            _wait_until(lambda pid=asleep[1]["child"]: not _is_running(pid))
    assert (tmp_path / "interrupted.txt").read_text() == "KeyboardInterrupt()"
    assert (tmp_path / "terminated.txt").read_text() == "SystemExit(143)"
    assert launcher_in_a_terminal.wait(10) == -signal.SIGKILL


@pytest.fixture
def launcher_in_a_terminal(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    master_fd, terminal_fd = pty.openpty()
    os.set_inheritable(terminal_fd, True)
    subprocess.run(["stty", "columns", "123"], stdin=terminal_fd, check=True)
    launcher = subprocess.Popen(
        [sys.executable, "-m", "tests.runtime.launch_entries", "launch", str(tmp_path)],
        cwd=ROOT,
        env=_environment(),
        stdout=terminal_fd,
        stderr=terminal_fd,
        start_new_session=True,
    )
    os.close(terminal_fd)
    yield launcher
    launcher.kill()
    launcher.wait()
    os.close(master_fd)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}


def _read_when_written(path: Path) -> dict[str, object]:
    _wait_until(path.exists)
    facts = json.loads(path.read_text())
    assert isinstance(facts, dict)
    return facts


def _wait_until(is_so: Callable[[], bool], limit_s: float = 60) -> None:
    """Wait for it; the limit only ends a test that would hang."""
    until_s = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < until_s, "waited in vain"
        time.sleep(0.02)


def _is_running(pid: int) -> bool:
    """Whether ``pid`` runs; a zombie, whose parent has yet to look, does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
