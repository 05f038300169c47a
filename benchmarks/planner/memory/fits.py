"""Whether every rank of a case fits its device, by replay of its allocations."""

from __future__ import annotations

from collections.abc import Callable

from allocation_trace import RankOfStage, steps
from cases import Case, peak_bytes

from shardstage.layout import Mesh
from shardstage.simulator.allocator import replay

__all__ = ["fits"]

A100_80GB_BYTES = 85_199_945_728
"""What nvidia-smi and torch report of an A100 with 80 GB: 81,252 MiB."""

CUDA_CONTEXT_BYTES = 500_000_000
"""A context with torch's and cuBLAS's kernels on A100: 450 to 500 MiB."""

COMMUNICATOR_BYTES = 400_000_000
"""NCCL on NVLink: 24 channels x 2 directions x about 8 MiB (buffers of its three protocols)."""

CLEAR_RATIOS = (0.5, 1.2)
"""A peak below or above so much of the device, by the library's formulas, needs no replay."""


def fits(case: Case, stage_of: Callable[[int], RankOfStage]) -> bool:
    """Whether the first, second and last pipeline ranks, of which one holds most, get all that they ask for."""
    mesh = case.mesh
    peak, least, most = max(peak_bytes(case)), *(ratio * _free_bytes(mesh, 0) for ratio in CLEAR_RATIOS)
    if not least <= peak <= most:
        return peak < least
    ranks = sorted({0, min(1, mesh.pp - 1), mesh.pp - 1})
    return all(_rank_fits(stage_of(rank), _free_bytes(mesh, rank)) for rank in ranks)


def _free_bytes(mesh: Mesh, rank: int) -> int:
    """What torch can have beside the context and a communicator for the world, each axis, and each rank that is sent to or received from
    (torch makes one for every such pair)."""
    pairs = (rank > 0) + (rank < mesh.pp - 1)
    communicators = 1 + sum(degree > 1 for degree in (mesh.dp, mesh.tp, mesh.pp)) + pairs
    return A100_80GB_BYTES - CUDA_CONTEXT_BYTES - communicators * COMMUNICATOR_BYTES


def _rank_fits(stage: RankOfStage, free: int) -> bool:
    """A pipeline's communicators are made when they are first used, at the latest after the first backward, for the norm of the gradients.

    NCCL then asks the device for their buffers; it cannot make torch give back what it caches, and fails.
    """
    first, next_step = steps(stage)
    if stage.pp > 1 and replay(first).reserved_bytes > free:
        return False
    return replay([*first, *next_step], capacity_bytes=free).failed is None
