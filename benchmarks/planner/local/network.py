"""Hosts made of network namespaces, joined by a bridge, whose links carry so many bits a second; a back end whose ranks sit on them.

The ranks are ordinary processes of one machine that met through a store there. A rank enters its host when the first group of the
back end is made: sockets that are open already stay where they are, all later ones are the host's.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from shardstage.runtime.process_group import ShardstageProcessGroup
from shardstage.runtime.shared_memory import Progress, SharedMemoryOptions

__all__ = ["BACKEND", "hosts", "register_network_backend", "require_network_tools"]

BACKEND = "shardstage-network"
BRIDGE = "sslbr"
BURST = "1mb"
"""Of the token bucket: at 1 Gbit/s smaller ones stall the link, and messages below it pass unshaped."""

_CLONE_NEWNET = 0x4000_0000
"""The kind of namespace that ``setns`` is to enter (linux/sched.h)."""


def require_network_tools() -> None:
    """Ends the program, saying what is missing, where hosts cannot be made."""
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("tc") is None:
        raise SystemExit(
            "this benchmark makes network namespaces, which needs root, ip and tc:\n"
            "  apt-get install iproute2\n"
            "  sudo -E env PYTHONPATH=src python benchmarks/planner/local/run.py"
        )


@contextmanager
def hosts(num_hosts: int, gigabits_per_s: float) -> Iterator[None]:
    """Namespaces, veth pairs and a bridge, removed at the end; each host sends at most ``gigabits_per_s``."""
    shape = f"rate {gigabits_per_s:g}gbit burst {BURST} latency 100ms"
    try:
        _run(f"ip link add {BRIDGE} type bridge")
        _run(f"ip link set {BRIDGE} up")
        for number in range(num_hosts):
            name, inside = _host(number), _interface(number)
            _run(f"ip netns add {name}")
            _run(f"ip link add {inside} type veth peer name {name}br")
            _run(f"ip link set {inside} netns {name}")
            _run(f"ip link set {name}br master {BRIDGE} up")
            _run(f"ip netns exec {name} ip link set lo up")
            _run(f"ip netns exec {name} ip link set {inside} up")
            _run(f"ip netns exec {name} ip addr add 10.79.0.{number + 1}/24 dev {inside}")
            _run(f"ip netns exec {name} tc qdisc replace dev {inside} root tbf {shape}")
        yield
    finally:
        for number in range(num_hosts):
            for command in (f"ip link del {_host(number)}br", f"ip netns del {_host(number)}"):
                with suppress(subprocess.CalledProcessError):
                    _run(command)
        with suppress(subprocess.CalledProcessError):
            _run(f"ip link del {BRIDGE}")


def register_network_backend() -> None:
    """Makes ``BACKEND`` known to ``torch.distributed``: the process group that runs use, on the host of the rank, without shared memory."""
    if BACKEND in dist.Backend.backend_list:
        return
    progress = Progress()

    def create(group_options: Any, _pg_options: Any) -> ShardstageProcessGroup:
        if not dist.is_initialized():  # the first group is the world
            _enter_host(group_options.group_rank)
        return ShardstageProcessGroup(
            store=group_options.store,
            rank=group_options.group_rank,
            size=group_options.group_size,
            timeout=group_options.timeout,
            global_ranks=group_options.global_ranks_in_group,
            options=SharedMemoryOptions(enabled=False),
            progress=progress,
        )

    dist.Backend.register_backend(BACKEND, create, extended_api=True, devices=["cpu"])


def _enter_host(number: int) -> None:
    """Moves this thread, and those that it starts from now on, to a host."""
    os.environ["GLOO_SOCKET_IFNAME"] = _interface(number)
    with Path(f"/run/netns/{_host(number)}").open() as namespace:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(namespace.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"rank {number} cannot enter {_host(number)}")


def _host(number: int) -> str:
    return f"ssl{number}"


def _interface(number: int) -> str:
    return f"{_host(number)}in"


def _run(command: str) -> None:
    subprocess.run(command.split(), check=True, capture_output=True)
