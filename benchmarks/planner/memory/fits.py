"""Whether every rank of a case fits its device, by replay of its allocations."""

from __future__ import annotations

from allocation_trace import Logits, allocations
from cases import Case

from shardstage.simulator.allocator import replay

__all__ = ["fits"]

A100_80GB_BYTES = 85_199_945_728
"""What nvidia-smi and torch report of an A100 with 80 GB: 81,252 MiB."""

CUDA_CONTEXT_BYTES = 500_000_000
"""A context with torch's and cuBLAS's kernels on A100: 450 to 500 MiB."""

COMMUNICATOR_BYTES = 400_000_000
"""NCCL on NVLink: 24 channels x 2 directions x about 8 MiB (buffers of its three protocols)."""

UNDER_PREDICTED_RATIO = 0.062
"""The largest under-prediction of a peak with a stated kernel in the other sets (run.py): the part of the device that a plan should
leave free. Not taken from the runs that it is tested on."""


def fits(case: Case, logits: Logits) -> bool:
    """Whether the first, second and last pipeline ranks, of which one holds most, get all that they ask for."""
    mesh = case.mesh
    communicators = 1 + sum(degree > 1 for degree in (mesh.dp, mesh.tp, mesh.pp))
    free = A100_80GB_BYTES - CUDA_CONTEXT_BYTES - communicators * COMMUNICATOR_BYTES
    capacity = round(free * (1 - UNDER_PREDICTED_RATIO))
    ranks = sorted({0, min(1, mesh.pp - 1), mesh.pp - 1})
    if any(case.ranks()[rank].total_bytes > 1.2 * free for rank in ranks):
        return False
    return all(
        replay(allocations(case, rank, logits), capacity_bytes=capacity).failed is None for rank in ranks
    )
