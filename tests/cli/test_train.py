"""``shardstage train`` as it is really run: in a terminal, under signals, with dying ranks, under torchrun and srun."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tests.training.models import TINY

from shardstage.cli.stdout import EXIT_CLOSED_PIPE

ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "-m", "shardstage", "train")
LIMIT_S = 120.0
"""For what takes seconds on a quiet machine."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Holds ``run.toml`` of a run of two ranks that would go on for hours."""
    (tmp_path / "text.txt").write_text(
        "Everyone has the right to recognition as a person before the law. " * 40
    )
    (tmp_path / "run.toml").write_text(
        f'model = "{TINY}"\nplan = "dp=2"\nranks = 2\nsteps = 1_000_000\nglobal_batch = 4\n'
        'checkpoint_every = 10\nout = "out"\n[data]\npaths = ["text.txt"]\nsequence = 16\n'
    )
    return tmp_path


def environment(**variables: str) -> dict[str, str]:
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "COLUMNS"))
    }
    path = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    return inherited | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": "cache"} | variables


def train(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *options], cwd=folder, env=environment(), capture_output=True, text=True, timeout=LIMIT_S
    )


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts the run; whatever is left of it when the test ends is killed."""
    started: list[subprocess.Popen[bytes]] = []

    def begin(*options: str, **streams: Any) -> subprocess.Popen[bytes]:
        popen = subprocess.Popen(
            [*COMMAND, "--run", "run.toml", *options], cwd=folder, env=environment(TERM="xterm"), **streams
        )
        started.append(popen)
        return popen

    yield begin
    for popen in started:
        with suppress(ProcessLookupError):
            popen.kill()
        popen.wait()


def steps_logged(folder: Path) -> int:
    log = folder / "out" / "log.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def wait_until(is_so: Callable[[], bool]) -> None:
    until_s = time.monotonic() + LIMIT_S
    while not is_so():
        assert time.monotonic() < until_s, "waited in vain"
        time.sleep(0.05)


def ranks_of(launcher: int) -> dict[int, int]:
    """Process ids by rank of what this launcher started and is still there."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            variables = (path / "environ").read_bytes().decode(errors="replace").split("\0")
            rank = [entry.removeprefix("RANK=") for entry in variables if entry.startswith("RANK=")]
            if f"SHARDSTAGE_LAUNCHER={launcher}" in variables and rank:
                found[int(rank[0])] = int(path.name)
    return found


def test_ctrl_c_in_a_terminal_stops_all_ranks_and_says_how_to_go_on(
    folder: Path, start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    """The live bar is drawn; the cursor that it hides comes back; the run then goes on from its checkpoint."""
    master, terminal = pty.openpty()
    popen = start(stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True)
    os.close(terminal)
    shown = bytearray()

    def read() -> bool:
        with suppress(OSError):
            shown.extend(os.read(master, 65_536))
        return steps_logged(folder) > 11

    wait_until(read)
    assert sorted(ranks_of(popen.pid)) == [0, 1]
    popen.send_signal(signal.SIGINT)
    with suppress(OSError):
        while part := os.read(master, 65_536):
            shown.extend(part)
    assert popen.wait(LIMIT_S) == 130
    os.close(master)
    assert ranks_of(popen.pid) == {}
    text = shown.decode()
    assert re.search(r"training.*━.*\d+/1000000.*loss \d\.\d{4}.*tokens/s", text)
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor is shown again"
    stopped = re.search(r"stopped after (\d+) of 1000000 steps; step (\d+) is saved in out/checkpoints", text)
    assert stopped is not None
    assert int(stopped[2]) <= int(stopped[1])
    assert "go on with: shardstage train --resume --out out" in text
    before = [json.loads(line)["loss"] for line in (folder / "out" / "log.jsonl").read_text().splitlines()]
    last = int(stopped[2]) + 3
    resumed = train(folder, "--resume", "--out", "out", "--steps", str(last))
    assert (resumed.returncode, resumed.stderr) == (0, "")
    lines = [json.loads(line) for line in (folder / "out" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(last))
    common = min(len(before), last)
    assert [line["loss"] for line in lines][:common] == before[:common], "bit for bit"
    assert "peak memory, rank 1" in resumed.stdout


def test_a_run_whose_output_nobody_reads_any_more_goes_on_to_its_end(
    folder: Path, start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    """``train | head`` ended it with "rank 0 ended with exit code 1", and nothing was saved."""
    popen = start("--steps", "200", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert popen.stdout is not None and popen.stderr is not None
    while not popen.stdout.readline().startswith(b"step 1/"):
        assert popen.poll() is None
    popen.stdout.close()
    assert popen.wait(LIMIT_S) == EXIT_CLOSED_PIPE
    with popen.stderr:
        assert popen.stderr.read() == b""
    assert steps_logged(folder) == 200
    assert (folder / "out" / "summary.json").exists()


def test_a_killed_rank_ends_the_job_with_its_name_and_sigterm_ends_it_too(
    folder: Path, start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    popen = start(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_until(lambda: steps_logged(folder) > 11)
    os.kill(ranks_of(popen.pid)[1], signal.SIGKILL)
    _, error = popen.communicate(timeout=LIMIT_S)
    assert popen.returncode == 1
    assert "error: rank 1 of 2 was killed by SIGKILL" in error.decode()
    assert "go on with: shardstage train --resume --out out" in error.decode()
    assert ranks_of(popen.pid) == {}
    num_logged = steps_logged(folder)
    again = start("--resume", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_until(lambda: steps_logged(folder) > num_logged)
    again.send_signal(signal.SIGTERM)
    _, error = again.communicate(timeout=LIMIT_S)
    assert again.returncode == 128 + signal.SIGTERM
    assert "of 1000000 steps; step " in error.decode()
    assert ranks_of(again.pid) == {}


def test_torchrun_starts_the_same_run_and_a_refusal_is_said_once(folder: Path) -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    command = [*torchrun, "-m", "shardstage", "train", "--run-file", "run.toml", "--steps", "3"]
    options: dict[str, Any] = {"cwd": folder, "capture_output": True, "text": True, "timeout": LIMIT_S}
    done = subprocess.run([*command, "--plan", "tp=2"], env=environment(), **options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("peak memory, rank 1") == 1
    assert "step 3/3" in done.stdout
    assert done.stdout.count("plan   dp=1, tp=2, pp=1 on 2 ranks") == 1
    refused = subprocess.run([*command, "--plan", "tp=3", "--out", "other"], env=environment(), **options)
    assert refused.returncode == 1, "torchrun's own"
    assert refused.stderr.count("error: tp=3 × pp=1 needs a multiple of 3 ranks, and there are 2") == 1
    assert not (folder / "other").exists()


def test_srun_starts_the_same_run(folder: Path) -> None:
    job = free_slurm_job()
    ranks = [
        subprocess.Popen(
            [*COMMAND, "--run", "run.toml", "--steps", "3", "--plan", "pp=2"],
            cwd=folder,
            env=environment(
                SLURM_PROCID=str(rank),
                SLURM_LOCALID=str(rank),
                SLURM_NTASKS="2",
                SLURM_STEP_NUM_TASKS="2",
                SLURM_STEP_TASKS_PER_NODE="2",
                SLURM_NODEID="0",
                SLURM_JOB_ID=str(job),
                SLURM_STEP_ID="0",
                SLURM_STEP_NODELIST="localhost",
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [popen.communicate(timeout=LIMIT_S) for popen in ranks]
    assert [popen.returncode for popen in ranks] == [0, 0], outputs
    assert "step 3/3" in outputs[0][0]
    assert outputs[1][0] == ""
    assert steps_logged(folder) == 3


def free_slurm_job() -> int:
    """A job number whose port (12000 and up, by job) nobody uses here."""
    for job in range(os.getpid() % 10_000, 19_000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", 12_000 + job)) != 0:
                return job
    raise AssertionError("no free port")
