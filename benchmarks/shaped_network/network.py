"""Two hosts made of network namespaces, joined by a bridge, whose links carry so many bits a second."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress

__all__ = ["ADDRESSES", "in_host", "interface", "two_hosts"]

HOSTS = ("ssA", "ssB")
BRIDGE = "ssbr"
ADDRESSES = ("10.78.0.1", "10.78.0.2")
BURST = "1mb"
"""Of the token bucket: at 1 Gbit/s smaller ones stall the link, and messages below it pass unshaped."""


@contextmanager
def two_hosts(gigabits_per_s: float | None) -> Iterator[None]:
    """Namespaces, veth pairs and a bridge, removed at the end; ``None`` leaves the links as fast as they are. Needs root, ip and tc."""
    if shutil.which("ip") is None or shutil.which("tc") is None:
        raise SystemExit("this benchmark needs root and iproute2: apt-get install iproute2")
    try:
        _run(f"ip link add {BRIDGE} type bridge")
        _run(f"ip link set {BRIDGE} up")
        for number, (host, address) in enumerate(zip(HOSTS, ADDRESSES, strict=True)):
            _run(f"ip netns add {host}")
            _run(f"ip link add {interface(number)} type veth peer name {host}br")
            _run(f"ip link set {interface(number)} netns {host}")
            _run(f"ip link set {host}br master {BRIDGE} up")
            _run(f"ip netns exec {host} ip link set lo up")
            _run(f"ip netns exec {host} ip link set {interface(number)} up")
            _run(f"ip netns exec {host} ip addr add {address}/24 dev {interface(number)}")
            if gigabits_per_s is not None:
                shape = f"rate {gigabits_per_s:g}gbit burst {BURST} latency 100ms"
                _run(f"ip netns exec {host} tc qdisc replace dev {interface(number)} root tbf {shape}")
        yield
    finally:
        for number, host in enumerate(HOSTS):
            for command in (f"ip netns exec {host} ip link del {interface(number)}", f"ip netns del {host}"):
                with suppress(subprocess.CalledProcessError):
                    _run(command)
        with suppress(subprocess.CalledProcessError):
            _run(f"ip link del {BRIDGE}")


def interface(host: int) -> str:
    return f"{HOSTS[host]}0"


def in_host(host: int, command: list[str]) -> list[str]:
    """The command, run on a host."""
    return ["ip", "netns", "exec", HOSTS[host], *command]


def _run(command: str) -> None:
    subprocess.run(command.split(), check=True, capture_output=True)
