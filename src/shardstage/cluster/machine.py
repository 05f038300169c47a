"""What the operating system says of this machine: its processor and how much memory a process may use."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path

__all__ = ["cpu_model", "memory_bytes", "num_cores"]


def num_cores() -> int:
    """CPU cores that this program may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model(root: Path = Path("/")) -> str:
    """The processor's name, or the architecture where the system does not tell."""
    for line in _lines(root / "proc/cpuinfo"):
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return value.strip()
    return platform.processor() or platform.machine()


def memory_bytes(root: Path = Path("/")) -> int:
    """Memory that the processes of this machine may use together: what is installed, or less by a cgroup's limit."""
    installed = [
        int(line.split()[1]) * 1024 for line in _lines(root / "proc/meminfo") if line.startswith("MemTotal:")
    ]
    physical = installed[0] if installed else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([physical, *_cgroup_limits(root)])


def _cgroup_limits(root: Path) -> Iterator[int]:
    """The limits of this process's group and of all groups around it, of both versions of the interface."""
    for line in _lines(root / "proc/self/cgroup"):  # 0::/path  or  9:memory:/path
        _, controllers, path = line.split(":", 2)
        home, name = ("memory", "memory.limit_in_bytes") if "memory" in controllers else ("", "memory.max")
        if controllers and not home:
            continue
        top = root / "sys/fs/cgroup" / home
        group = top / path.strip("/")
        for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(top))):
            yield from (int(text) for text in _lines(folder / name) if text.isdigit())


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
