"""The probe: its arithmetic on made-up samples, and one real measurement of this machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shardstage.cluster import Cluster, LinearCost, load, save
from shardstage.cluster.probe import probe
from shardstage.cluster.samples import Sample, cluster_from_samples, group_sizes
from shardstage.errors import ClusterError, RankFailedError

LOCAL = (
    Sample("gemm", "float32", 1, 1e3, 1e-6),
    Sample("gemm", "float32", 1, 1e6, 5e-7),
    Sample("gemm", "float32", 1, 1e9, 1e-2),
    Sample("op", "", 1, 1, 3e-6),
    Sample("copy", "", 1, 1e6, 1e-3),
)


def exchanges(kind: str, group: int, line: LinearCost) -> list[Sample]:
    return [Sample(kind, "float32", group, size, line.seconds(size)) for size in (1e3, 1e5, 1e7)]


def reduced(num_ranks: int, *samples: Sample) -> Cluster:
    return cluster_from_samples(
        (*LOCAL, *samples),
        num_ranks=num_ranks,
        device_name="Toy CPU",
        device_kind="cpu",
        memory_bytes=1000,
        source="made up",
    )


SMALLEST = exchanges("p2p", 2, LinearCost(1e-4, 1e9))


def fail_to_prepare() -> None:
    raise ValueError("nothing is ready")


def test_samples_become_rates() -> None:
    device = reduced(1).device
    assert device.bytes_per_s == 2e9
    assert device.op_latency_s == 3e-6
    assert device.flops_per_s == {"float32": 1e12}


def test_a_rank_that_shares_cores_is_quicker_alone() -> None:
    shared = (Sample("busy", "float32", 1, 1e6, 6e-6), Sample("alone", "float32", 1, 1e6, 2.5e-6))
    assert reduced(4, *SMALLEST, *shared).device.alone_ratio == 2.4
    assert reduced(2, *SMALLEST, *shared).device.alone_ratio == 2
    noise = (Sample("busy", "float32", 1, 1e6, 2e-6), Sample("alone", "float32", 1, 1e6, 2.1e-6))
    assert reduced(1).device.alone_ratio == reduced(2, *SMALLEST, *noise).device.alone_ratio == 1


def test_messages_take_of_the_cores_that_ranks_share() -> None:
    message = LinearCost(5e-4, 1e9)
    assert reduced(4, *SMALLEST, *exchanges("message", 2, message)).device.message == pytest.approx(message)
    assert reduced(4, *SMALLEST).device.message is None


def test_a_larger_product_is_never_quicker_than_a_smaller_one() -> None:
    assert reduced(1).device.gemm[0].points == ((1e3, 1e9), (1e6, 1e12), (1e9, 1e11))


def test_exchanges_become_one_curve_for_each_kind_and_group() -> None:
    all_reduce, message = LinearCost(1e-3, 1e9), LinearCost(1e-4, 2e9)
    cluster = reduced(2, *exchanges("all_reduce", 2, all_reduce), *exchanges("p2p", 2, message))
    assert cluster.collective("all_reduce", 2) == pytest.approx(all_reduce)
    assert cluster.collective("p2p", [1, 0]) == pytest.approx(message)
    assert (cluster.levels[0].latency_s, cluster.levels[0].bytes_per_s) == pytest.approx(message)


def test_three_ranks_take_their_link_from_the_gathering_of_all() -> None:
    cluster = reduced(3, *exchanges("all_gather", 3, LinearCost(2e-3, 3e9)))
    assert (cluster.levels[0].latency_s, cluster.levels[0].bytes_per_s) == pytest.approx((1e-3, 2e9))


def test_groups_tile_the_ranks() -> None:
    assert [group_sizes(ranks) for ranks in (1, 2, 3, 4, 6)] == [(), (2,), (3,), (2, 4), (2, 3, 6)]


def test_a_gpu_s_compute_capability_is_kept() -> None:
    """A measured V100 would be planned as an A100 otherwise: with bfloat16 and flash attention."""
    known: dict[str, Any] = {
        "num_ranks": 1,
        "device_name": "Toy",
        "device_kind": "cuda",
        "memory_bytes": 1000,
        "source": "made up",
    }
    assert cluster_from_samples(LOCAL, **known).device.compute_capability is None
    assert cluster_from_samples(LOCAL, **known, compute_capability=7.0).device.compute_capability == 7.0


def test_two_real_ranks_measure_this_machine(tmp_path: Path) -> None:
    cluster = probe(2, budget_s=1.0, device="cpu")
    assert (cluster.num_devices, cluster.device.compute_capability) == (2, None)
    assert {"float32", "bfloat16", "float64"} == set(cluster.device.flops_per_s)
    assert (
        cluster.collective("all_reduce", 2).seconds(2**20)
        > cluster.collective("all_reduce", 2).seconds(8)
        > 0
    )
    assert {curve.kind for curve in cluster.collectives} > {
        "all_gather",
        "reduce_scatter",
        "all_to_all",
        "p2p",
    }
    assert cluster.device.source.startswith("measured by shardstage probe on ")
    assert cluster.device.source.endswith(", 2 ranks, gloo")
    save(cluster, tmp_path / "here.toml")
    assert load(tmp_path / "here.toml") == cluster


def test_an_interrupt_while_ranks_start_is_the_caller_s_alone() -> None:
    """Ctrl-C goes to all processes of a terminal: ranks in the midst of importing torch answered with a traceback each."""
    script = (
        "import os, signal, threading\n"
        "import torch.multiprocessing as multiprocessing\n"
        "from shardstage.cluster.probe import probe\n"
        "if __name__ == '__main__':\n"
        "    start = multiprocessing.start_processes\n"
        "    def interrupted(*args, **options):\n"
        "        started = start(*args, **options)\n"
        "        threading.Timer(0.3, os.killpg, (0, signal.SIGINT)).start()\n"
        "        return started\n"
        "    multiprocessing.start_processes = interrupted\n"
        "    try:\n"
        "        probe(2, budget_s=1.0, device='cpu')\n"
        "    except KeyboardInterrupt:\n"
        "        print('interrupted')\n"
    )
    command = [sys.executable, "-c", script]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, start_new_session=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "interrupted\n", "")


def test_a_rank_that_fails_is_named_with_its_reason() -> None:
    with pytest.raises(RankFailedError, match="rank 0 of the probe failed: ValueError: nothing is ready"):
        probe(1, budget_s=1.0, device="cpu", prepare=fail_to_prepare)


@pytest.mark.parametrize(
    ("ranks", "device", "message"),
    [
        (0, None, "cannot be measured with 0 ranks"),
        (2, "tpu", "unknown device 'tpu'"),
        (4096, "cuda", "4096 ranks need 4096 GPUs"),
    ],
)
def test_a_machine_that_is_not_there_is_refused(ranks: int, device: str | None, message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        probe(ranks, device=device)
