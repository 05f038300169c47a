"""What the ranks of the launch tests run; it imports no torch and no pytest, so that most of them start at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from shardstage.errors import DataError
from shardstage.runtime.environment import RankEnvironment, detect_environment, join_world, leave_world
from shardstage.runtime.launch import launch, run_as_rank


class OwnError(DataError):
    """A user's subclass that pickle cannot rebuild."""

    def __init__(self) -> None:
        super().__init__("own words", hint="own hint")


def say_hello(environment: RankEnvironment, folder: Path) -> None:
    print(f"out of rank {environment.rank}")
    print(f"err of rank {environment.rank}", file=sys.stderr)
    facts = {
        "environment": vars(environment),
        "detected": vars(detect_environment() or environment),
        "threads": os.environ["OMP_NUM_THREADS"],
        "colour": os.environ.get("COLOUR"),
        "has_torch": "torch" in sys.modules,
    }
    (folder / f"hello{environment.rank}.json").write_text(json.dumps(facts))


def compute_together(environment: RankEnvironment, folder: Path, slurm_job: int | None = None) -> None:
    """Sum rank + 1 over the ranks; then once more as a Slurm step would meet, if a job number is given."""
    import torch
    import torch.distributed as dist

    totals = []
    for joined in (environment, _as_slurm(environment, slurm_job) if slurm_job else None):
        if joined is not None:
            join_world(joined, device="cpu", timeout_s=60)
            total = torch.tensor([joined.rank + 1.0])
            dist.all_reduce(total)
            leave_world()
            totals.append([joined.source, joined.world_size, total.item(), torch.get_num_threads()])
    (folder / f"totals{environment.rank}.json").write_text(json.dumps(totals))


def kill_itself_mid_collective(environment: RankEnvironment, victim: int) -> None:
    import torch
    import torch.distributed as dist

    join_world(environment, device="cpu", timeout_s=300)
    for step in range(1_000_000):
        if environment.rank == victim and step == 3:
            print("about to be killed", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.ones(1000))


def leave_the_collective(environment: RankEnvironment, victim: int) -> None:
    import torch
    import torch.distributed as dist

    join_world(environment, device="cpu", timeout_s=1)
    if environment.rank == victim:
        time.sleep(600)
    dist.all_reduce(torch.ones(1000))


def raise_on_one(environment: RankEnvironment, victim: int, folder: Path) -> None:
    """The victim of the cause speaks first, as a reset connection often does."""
    if environment.rank == victim:
        (folder / "failed").touch()
        time.sleep(0.2)
        raise ValueError("the loss is NaN\nat step 12")
    while not (folder / "failed").exists():
        time.sleep(0.01)
    raise RuntimeError("Read error [127.0.0.1]:1234: Connection reset by peer")


def refuse_on_all(environment: RankEnvironment) -> None:
    raise DataError("only 10 tokens", hint="seq_len = 4")


def refuse_in_own_words(environment: RankEnvironment) -> None:
    if environment.rank == 1:
        raise OwnError
    time.sleep(600)


def exit_with(environment: RankEnvironment, code: int | str) -> None:
    if environment.rank == 1:
        sys.exit(code)


def leave_a_process(environment: RankEnvironment, folder: Path) -> None:
    child = subprocess.Popen(["sleep", "600"])
    (folder / f"child{environment.rank}").write_text(str(child.pid))


def sleep_stubbornly(environment: RankEnvironment, folder: Path) -> None:
    """Refuse SIGTERM and start a process that outlives its parent, then say which processes these are."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    facts = {
        "pid": os.getpid(),
        "child": subprocess.Popen(["sleep", "600"]).pid if environment.rank == 1 else None,
        "is_terminal": [sys.stdout.isatty(), sys.stderr.isatty()],
        "columns": os.get_terminal_size(2).columns if sys.stderr.isatty() else None,
    }
    unfinished = folder / f"{environment.rank}.part"
    unfinished.write_text(json.dumps(facts))
    unfinished.rename(folder / f"asleep{environment.rank}.json")
    time.sleep(600)


def launch_three_times(folder: Path) -> None:
    """A launcher for a test to stop: by SIGINT, by SIGTERM, by SIGKILL; it notes how ``launch`` ended."""
    for attempt in ("interrupted", "terminated", "killed"):
        (folder / attempt).mkdir()
        try:
            launch(
                sleep_stubbornly, (folder / attempt,), num_ranks=2, log_dir=folder / "logs", stop_grace_s=0.3
            )
        except BaseException as error:
            (folder / f"{attempt}.txt").write_text(repr(error))


def _as_slurm(environment: RankEnvironment, job: int) -> RankEnvironment | None:
    return detect_environment(
        {
            "SLURM_JOB_ID": str(job),
            "SLURM_STEP_ID": "0",
            "SLURM_PROCID": str(environment.rank),
            "SLURM_LOCALID": str(environment.local_rank),
            "SLURM_STEP_NUM_TASKS": str(environment.world_size),
            "SLURM_STEP_TASKS_PER_NODE": str(environment.world_size),
            "SLURM_STEP_NODELIST": "localhost",
        }
    )


if __name__ == "__main__":
    if sys.argv[1] == "launch":
        launch_three_times(Path(sys.argv[2]))
    else:
        under_torchrun = detect_environment()
        assert under_torchrun is not None
        run_as_rank(compute_together, (Path(sys.argv[2]),), under_torchrun)
