"""What the command line knows of the machine it runs on: how many ranks, and its measured cluster file."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

from shardstage.cluster import Cluster, load
from shardstage.cluster.machine import cpu_model, memory_bytes
from shardstage.errors import ClusterError
from shardstage.graph.cache import cache_folder, write_whole

__all__ = ["cluster_named", "known_cluster", "num_default_ranks", "probe_machine"]

QUICK_BUDGET_S = 15.0
"""Seconds that a run spends on looking at a machine it has not seen before; `shardstage probe` takes more care."""


def num_default_ranks() -> int:
    """One rank for each GPU, or for each core where there is none."""
    import torch

    from shardstage.runtime.environment import num_usable_cores

    return torch.cuda.device_count() or num_usable_cores()


def probe_machine(ranks: int, *, budget_s: float) -> Cluster:
    """This machine as ``ranks`` ranks see it through the process group that runs use."""
    import torch

    from shardstage.cluster.probe import probe
    from shardstage.runtime.process_group import BACKEND, register_backend

    if torch.cuda.device_count() >= ranks:
        return probe(ranks, budget_s=budget_s)
    return probe(ranks, budget_s=budget_s, device="cpu", backend=BACKEND, prepare=register_backend)


def cluster_named(spec: str, *, ranks: int) -> Cluster:
    """A preset or file; ``local`` is this machine, measured once and remembered where captures are, if anywhere."""
    known = known_cluster(spec, ranks=ranks)
    if known is not None:
        return known
    cluster = probe_machine(ranks, budget_s=QUICK_BUDGET_S)
    path = _measured_file(ranks)
    if path is not None:
        with contextlib.suppress(OSError):  # a home that cannot be written: measured again next time
            write_whole(path, cluster.to_toml())
    return cluster


def known_cluster(spec: str, *, ranks: int) -> Cluster | None:
    """``cluster_named`` without a measurement: None where this machine has not been looked at with that many ranks."""
    if spec != "local":
        return load(spec)
    path = _measured_file(ranks)
    try:
        return load(path) if path is not None and path.exists() else None
    except ClusterError:  # of an older version: measured anew
        return None


def _measured_file(ranks: int) -> Path | None:
    """None where the user wants nothing kept."""
    folder = cache_folder()
    return None if folder is None else folder / f"cluster-{_machine_key(ranks)}.toml"


def _machine_key(ranks: int) -> str:
    """Changes with whatever would make an old measurement wrong."""
    import torch

    from shardstage.runtime.environment import num_usable_cores

    described = (
        cpu_model(),
        memory_bytes(),
        num_usable_cores(),
        torch.__version__,
        torch.cuda.device_count(),
        ranks,
    )
    return hashlib.sha256(repr(described).encode()).hexdigest()[:12]
