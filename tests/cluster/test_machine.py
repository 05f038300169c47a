"""What the operating system says, on machines made of files."""

from __future__ import annotations

from pathlib import Path

from shardstage.cluster.machine import cpu_model, memory_bytes

UNLIMITED_V1 = "9223372036854771712\n"


def machine(root: Path, **files: str) -> Path:
    for name, text in {"proc/meminfo": "MemTotal:  1000 kB\nMemFree: 1 kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_memory_without_a_limit_is_what_is_installed(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:memory:/job\n",
        "sys/fs/cgroup/memory/job/memory.limit_in_bytes": UNLIMITED_V1,
    }
    assert memory_bytes(machine(tmp_path, **files)) == 1000 * 1024


def test_the_limit_of_the_own_group_counts_in_version_2(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/pod/job\n", "sys/fs/cgroup/pod/job/memory.max": "4096\n"}
    assert memory_bytes(machine(tmp_path, **files)) == 4096


def test_the_limit_of_a_group_around_it_counts_too(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/pod/job\n",
        "sys/fs/cgroup/pod/memory.max": "8192\n",
        "sys/fs/cgroup/pod/job/memory.max": "max\n",
    }
    assert memory_bytes(machine(tmp_path, **files)) == 8192


def test_the_limit_of_version_1_counts_even_where_only_the_top_is_visible(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "8:pids:/x\n4:cpu,memory:/host/only\n0::/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "2048\n",
    }
    assert memory_bytes(machine(tmp_path, **files)) == 2048


def test_the_processor_is_named_and_else_the_architecture(tmp_path: Path) -> None:
    assert (
        cpu_model(machine(tmp_path, **{"proc/cpuinfo": "model name\t: Toy CPU @ 1 GHz\n"}))
        == "Toy CPU @ 1 GHz"
    )
    assert cpu_model(tmp_path / "nothing")


def test_this_machine_has_some_memory() -> None:
    assert memory_bytes() > 2**28
