"""Says which rank this process is, and joins it to the world of its peers.

A rank is started by ``shardstage`` itself (``launch.py``), by ``torchrun`` or by Slurm's ``srun``; the three
differ only in the variables that they set and in who hosts the store through which the ranks find each other:

    source       variables                                store
    shardstage   RANK WORLD_SIZE … SHARDSTAGE_LAUNCHER    the launcher, on a port that the system chose
    torchrun     RANK WORLD_SIZE … TORCHELASTIC_*         torchrun's agent (or rank 0, as ``env://`` decides)
    slurm        SLURM_PROCID SLURM_STEP_NODELIST …       rank 0, on a port derived from the job and step
    single       none                                     in memory
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Literal

from shardstage.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed import Store

__all__ = [
    "LAUNCHER_VARIABLE",
    "RankEnvironment",
    "detect_environment",
    "end_with_parent",
    "join_world",
    "leave_world",
    "num_usable_cores",
    "single_environment",
]

LAUNCHER_VARIABLE = "SHARDSTAGE_LAUNCHER"
"""Set to the launcher's process id in every rank that ``launch`` starts."""

_SLURM_FIRST_PORT, _SLURM_NUM_PORTS = 12_000, 20_000
"""Below Linux' ephemeral ports (32,768 and up, ``ip_local_port_range``), above the common services."""

_PR_SET_PDEATHSIG = 1
"""``prctl`` option of Linux (sys/prctl.h): the signal that this process gets when its parent dies."""


@dataclass(frozen=True, kw_only=True)
class RankEnvironment:
    """Which rank this process is and where its peers meet; ``local_`` counts are within this host."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int
    source: Literal["shardstage", "torchrun", "slurm", "single"]


def detect_environment(env: Mapping[str, str] = os.environ) -> RankEnvironment | None:
    """The rank that ``env`` describes, or None when this process was started by hand and is to be the
    launcher.

    Raises ConfigError when ``env`` names a rank but not its world.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        return _from_rank_variables(env)
    if "SLURM_PROCID" in env and "SLURM_STEP_NODELIST" in env and _slurm_world_size(env) > 1:
        return _from_slurm(env)
    # A batch script and `srun --pty bash` also have SLURM_PROCID=0, but no step of several tasks: a launcher
    # then.
    return None


def single_environment() -> RankEnvironment:
    """A world of one rank, in this process."""
    return RankEnvironment(
        rank=0,
        world_size=1,
        local_rank=0,
        local_world_size=1,
        master_addr="127.0.0.1",
        master_port=0,
        source="single",
    )


def join_world(
    environment: RankEnvironment,
    *,
    device: Literal["cpu", "cuda"],
    backend: str | None = None,
    timeout_s: float = 600,
) -> None:
    """Make the default process group, choose the CUDA device and the number of threads, and die with the
    parent. CPU ranks keep freed memory.

    ``backend`` defaults to gloo for CPU tensors and NCCL for CUDA tensors; ``"shardstage"`` is the
    shared-memory group of ``process_group.py``. A collective that waits longer than ``timeout_s`` raises on
    the waiting ranks. Raises ConfigError when this host has no CUDA device for the rank.
    """
    import torch
    import torch.distributed as dist

    from shardstage.runtime.c_allocator import keep_freed_memory

    _watch_parent(environment)
    torch.set_num_threads(_num_threads(environment, os.environ))
    device_id = None
    if device == "cuda":
        device_id = torch.device("cuda", _cuda_index(environment, torch.cuda.device_count()))
        torch.cuda.set_device(device_id)
    if backend == "shardstage":
        from shardstage.runtime.process_group import register_backend

        register_backend()
    if device == "cpu":
        keep_freed_memory()
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(
        backend or ("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"),
        store=_meeting_store(environment, timeout),
        rank=environment.rank,
        world_size=environment.world_size,
        timeout=timeout,
        device_id=device_id,
    )


def leave_world() -> None:
    """Destroy the default process group and all its subgroups; nothing happens when there is none."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def end_with_parent(parent_pid: int) -> None:
    """Have this process die when ``parent_pid``, which must be its parent, dies in any way, ``kill -9``
    included.

    The kernel does it on Linux, even if this process is stuck in native code; elsewhere a thread looks every
    0.5 s.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        _poll_parent(parent_pid)
    if os.getppid() != parent_pid:  # it died before the line above took effect
        os._exit(128 + signal.SIGTERM)


def num_usable_cores() -> int:
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _from_rank_variables(env: Mapping[str, str]) -> RankEnvironment:
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not env.get(name)]
    if missing:
        raise ConfigError(
            f"RANK={env['RANK']} is set but {' and '.join(missing)} is not: a rank cannot find its peers",
            hint="unset RANK WORLD_SIZE LOCAL_RANK",
        )
    world_size = _integer(env, "WORLD_SIZE")
    rank = _integer(env, "RANK")
    if not 0 <= rank < world_size:
        raise ConfigError(
            f"RANK={rank} is not in a world of {world_size}", hint="unset RANK WORLD_SIZE LOCAL_RANK"
        )
    return RankEnvironment(
        rank=rank,
        world_size=world_size,
        local_rank=_integer(env, "LOCAL_RANK", rank),
        local_world_size=_integer(env, "LOCAL_WORLD_SIZE", world_size),
        master_addr=env["MASTER_ADDR"],
        master_port=_integer(env, "MASTER_PORT"),
        source="shardstage" if LAUNCHER_VARIABLE in env else "torchrun",
    )


def _from_slurm(env: Mapping[str, str]) -> RankEnvironment:
    job, step = _integer(env, "SLURM_JOB_ID", 0), _integer(env, "SLURM_STEP_ID", 0)
    return RankEnvironment(
        rank=_integer(env, "SLURM_PROCID"),
        world_size=_slurm_world_size(env),
        local_rank=_integer(env, "SLURM_LOCALID", 0),
        local_world_size=_slurm_local_world_size(env),
        master_addr=env.get("MASTER_ADDR") or _first_host(env["SLURM_STEP_NODELIST"]),
        master_port=_integer(env, "MASTER_PORT", _SLURM_FIRST_PORT + (job + 7 * step) % _SLURM_NUM_PORTS),
        source="slurm",
    )


def _slurm_world_size(env: Mapping[str, str]) -> int:
    name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    return _integer(env, name, 1)


def _slurm_local_world_size(env: Mapping[str, str]) -> int:
    """Tasks on this node: SLURM_STEP_TASKS_PER_NODE is like ``4(x2),3``, one entry per run of equal nodes."""
    text = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE")
    if not text:
        return _slurm_world_size(env)
    tasks_per_node: list[int] = []
    for num_tasks, repeat in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        tasks_per_node += [int(num_tasks)] * int(repeat or 1)
    return tasks_per_node[_integer(env, "SLURM_NODEID", 0)]


def _first_host(nodelist: str) -> str:
    """``gpu[003-005,9],cpu1`` → ``gpu003``; every bracket gives its first number."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)
    if first is None:
        raise ConfigError(
            f"SLURM_STEP_NODELIST={nodelist!r} names no host", hint="export MASTER_ADDR=<host of rank 0>"
        )
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group())


def _integer(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise ConfigError(f"{name}={text!r} is not a whole number", hint=f"unset {name}") from None


def _watch_parent(environment: RankEnvironment) -> None:
    if environment.source in ("torchrun", "slurm"):
        # Not the kernel's watch: that follows the parent's *thread*, and a foreign launcher may end the one
        # that forked.
        _poll_parent(os.getppid())


def _poll_parent(parent_pid: int) -> None:
    def look() -> None:
        while os.getppid() == parent_pid:
            time.sleep(0.5)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=look, name="parent-watch", daemon=True).start()


def _num_threads(environment: RankEnvironment, env: Mapping[str, str]) -> int:
    for name in ("OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK"):
        if env.get(name, "").isdigit():
            return max(1, int(env[name]))
    return max(1, num_usable_cores() // environment.local_world_size)


def _cuda_index(environment: RankEnvironment, num_devices: int) -> int:
    if environment.source == "slurm" and num_devices == 1:
        return 0  # srun --gpus-per-task=1 shows each task its own device only
    if environment.local_rank >= num_devices:
        raise ConfigError(
            f"local rank {environment.local_rank} has no CUDA device: this host shows {num_devices}",
            hint=f"--ranks {num_devices}" if num_devices else "--device cpu",
        )
    return environment.local_rank


def _meeting_store(environment: RankEnvironment, timeout: timedelta) -> Store:
    """The key-value store through which the ranks exchange addresses."""
    import torch.distributed as dist

    if environment.source == "single":
        return dist.HashStore()
    if environment.source == "torchrun":
        store: Store = next(dist.rendezvous("env://", timeout=timeout))[0]
        return store
    return dist.TCPStore(
        environment.master_addr,
        environment.master_port,
        world_size=environment.world_size,
        is_master=environment.source == "slurm" and environment.rank == 0,
        timeout=timeout,
        wait_for_workers=False,
    )
