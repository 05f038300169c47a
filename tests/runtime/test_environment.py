from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from shardstage.errors import ConfigError
from shardstage.runtime import environment as module
from shardstage.runtime.environment import (
    RankEnvironment,
    detect_environment,
    join_world,
    leave_world,
    single_environment,
)

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "7",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "3",
    "MASTER_ADDR": "gpu1",
    "MASTER_PORT": "29400",
}
SLURM = {
    "SLURM_JOB_ID": "4211",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NUM_TASKS": "11",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
    "SLURM_STEP_NODELIST": "gpu[003-005]",
}


def test_a_process_started_by_hand_is_the_launcher() -> None:
    assert detect_environment({}) is None
    assert detect_environment({"RANK": "0"}) is None


def test_torchruns_variables_name_the_rank() -> None:
    assert detect_environment(TORCHRUN) == RankEnvironment(
        rank=5,
        world_size=7,
        local_rank=1,
        local_world_size=3,
        master_addr="gpu1",
        master_port=29400,
        source="torchrun",
    )
    launched = detect_environment({**TORCHRUN, module.LAUNCHER_VARIABLE: "77"})
    assert launched is not None and launched.source == "shardstage"


def test_slurms_variables_name_the_rank_on_uneven_nodes() -> None:
    assert detect_environment(SLURM) == RankEnvironment(
        rank=9,
        world_size=11,
        local_rank=1,
        local_world_size=3,
        master_addr="gpu003",
        master_port=12_000 + 4211 + 7 * 2,
        source="slurm",
    )


def test_torchrun_inside_a_slurm_step_is_torchrun() -> None:
    found = detect_environment({**SLURM, **TORCHRUN})
    assert found is not None and found.source == "torchrun"


def test_an_address_given_by_hand_wins_over_slurms() -> None:
    found = detect_environment({**SLURM, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"})
    assert found is not None and (found.master_addr, found.master_port) == ("10.0.0.1", 4000)


def test_a_batch_script_and_a_shell_in_a_step_are_launchers() -> None:
    batch = {key: value for key, value in SLURM.items() if "STEP" not in key}
    assert detect_environment({**batch, "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) is None
    assert detect_environment({**SLURM, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}) is None


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("node7", "node7"),
        ("a1,b[2-3]", "a1"),
        ("gpu[003-005,9],cpu1", "gpu003"),
        ("rack[2,4]-node[11-12]", "rack2-node11"),
        ("n1.cluster.org,n2.cluster.org", "n1.cluster.org"),
    ],
)
def test_the_first_host_of_a_node_list(nodelist: str, host: str) -> None:
    found = detect_environment({**SLURM, "SLURM_STEP_NODELIST": nodelist})
    assert found is not None and found.master_addr == host


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        ({**TORCHRUN, "MASTER_PORT": ""}, "RANK=5 is set but MASTER_PORT is not"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK=0 is set but MASTER_ADDR and MASTER_PORT is not"),
        ({**TORCHRUN, "RANK": "7"}, "RANK=7 is not in a world of 7"),
        ({**TORCHRUN, "WORLD_SIZE": "many"}, "WORLD_SIZE='many' is not a whole number"),
        ({**SLURM, "SLURM_STEP_NODELIST": ","}, "SLURM_STEP_NODELIST=',' names no host"),
    ],
)
def test_variables_that_name_no_place_are_refused(broken: dict[str, str], complaint: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        detect_environment(broken)
    assert refusal.value.message.startswith(complaint)
    assert refusal.value.hint


def test_a_single_rank_joins_a_world_of_one_and_leaves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    num_threads = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    join_world(single_environment(), device="cpu")
    try:
        total = torch.ones(3)
        dist.all_reduce(total)
        assert total.tolist() == [1, 1, 1]
        assert (dist.get_world_size(), dist.get_backend(), torch.get_num_threads()) == (1, "gloo", 1)
    finally:
        leave_world()
        torch.set_num_threads(num_threads)
    assert not dist.is_initialized()
    leave_world()


_FREES_LARGE_TENSORS = """
import sys, torch
from shardstage.runtime.c_allocator import keep_freed_memory
from shardstage.runtime.peak_memory import resident_bytes

if sys.argv[1:]:
    keep_freed_memory()
before = resident_bytes()
for _ in range(2):
    tensors = [torch.ones(2**21) for _ in range(8)]
    tensors.clear()
print(resident_bytes() - before)
"""


def test_a_cpu_rank_keeps_what_a_step_frees() -> None:
    """Eight tensors of 8 MiB, which the C allocator gives back to the system where it maps each by itself, and nobody asks it not to."""
    maps_each = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    resident = [
        int(
            subprocess.run(
                [sys.executable, "-c", _FREES_LARGE_TENSORS, *how],
                capture_output=True,
                check=True,
                env=maps_each,
            ).stdout
        )
        for how in ([], ["keep"])
    ]
    assert resident[0] < 32 * 2**20 < 64 * 2**20 <= resident[1]


def test_a_rank_without_a_cuda_device_is_told_how_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="local rank 0 has no CUDA device: this host shows 0") as refusal:
        join_world(single_environment(), device="cuda")
    assert refusal.value.hint == "--device cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    second = detect_environment({**TORCHRUN, module.LAUNCHER_VARIABLE: "1"})
    assert second is not None
    with pytest.raises(ConfigError, match="local rank 1 has no CUDA device: this host shows 1") as refusal:
        join_world(second, device="cuda")
    assert refusal.value.hint == "--ranks 1"


def test_a_process_ends_with_its_parent_even_if_the_parent_was_gone_before() -> None:
    code = (
        "import os, sys; from shardstage.runtime.environment import end_with_parent; "
        "end_with_parent(os.getppid() + int(sys.argv[1])); print('lives')"
    )
    source = str(Path(module.__file__).parents[2])
    ends = [
        subprocess.run(
            [sys.executable, "-c", code, offset],
            env={**os.environ, "PYTHONPATH": source},
            capture_output=True,
        )
        for offset in ("0", "1")
    ]
    assert (ends[0].returncode, ends[0].stdout) == (0, b"lives\n")
    assert (ends[1].returncode, ends[1].stdout) == (143, b"")


def test_the_environment_is_read_without_torch() -> None:
    code = "import sys, json; import shardstage.runtime.launch; print(json.dumps('torch' in sys.modules))"
    source = str(Path(module.__file__).parents[2])
    told = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": source},
        capture_output=True,
        check=True,
    )
    assert json.loads(told.stdout) is False
