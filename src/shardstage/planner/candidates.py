"""``choices``: everything that a search may choose, enumerated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

from shardstage.cluster import Cluster
from shardstage.graph import ModelGraph
from shardstage.layout import Mesh, balanced_sizes
from shardstage.plan import Recompute

__all__ = ["Choice", "choices"]

MAX_MICROBATCH_TOKENS: Final = 65_536
"""A larger microbatch is not tried: products of this many rows reach the best rate of every device we know."""

Zero = Literal[0, 1, 2, 3]
_ZEROS: Final[tuple[Zero, ...]] = (0, 1, 2, 3)
_RECOMPUTES: Final[tuple[Recompute, ...]] = ("none", "selective", "full")


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One point of the search space."""

    mesh: Mesh
    zero: Zero
    microbatch: int
    recompute: Recompute
    is_sequence_parallel: bool
    shares: tuple[int, ...]

    @property
    def complexity(self) -> tuple[int, int, int, int, bool]:
        """Of two equally fast plans the smaller one has fewer parts that can go wrong."""
        num_model_axes = (self.mesh.pp > 1) + (self.mesh.tp > 1)
        return (
            num_model_axes,
            self.zero,
            _RECOMPUTES.index(self.recompute),
            self.mesh.pp * self.mesh.tp,
            self.is_sequence_parallel,
        )


def choices(
    graph: ModelGraph,
    cluster: Cluster,
    num_ranks: int,
    global_batch: int,
    sequence: int | None,
    num_units: int,
) -> Iterator[Choice]:
    """All meshes of ``num_ranks`` with every saver; tp stays within the innermost links, pp within the number of units."""
    for mesh in _meshes(num_ranks, max_tp=cluster.devices_per(cluster.levels[0]), max_pp=num_units):
        if mesh.dp > global_batch:
            continue
        shares = balanced_sizes(global_batch, mesh.dp)
        for microbatch in _microbatches(graph, shares, sequence):
            for zero in _ZEROS if mesh.dp > 1 else _ZEROS[:1]:
                for recompute in _RECOMPUTES:
                    for is_sequence_parallel in (False, True) if mesh.tp > 1 else (False,):
                        yield Choice(
                            mesh=mesh,
                            zero=zero,
                            microbatch=microbatch,
                            recompute=recompute,
                            is_sequence_parallel=is_sequence_parallel,
                            shares=shares,
                        )


def _meshes(num_ranks: int, *, max_tp: int, max_pp: int) -> Iterator[Mesh]:
    for tp in _divisors(num_ranks):
        for pp in _divisors(num_ranks // tp):
            if tp <= max_tp and pp <= max_pp:
                yield Mesh(pp=pp, dp=num_ranks // tp // pp, tp=tp)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _microbatches(graph: ModelGraph, shares: tuple[int, ...], sequence: int | None) -> Iterator[int]:
    """Powers of two up to the largest share, and that itself, as far as no rank gets an empty microbatch."""
    largest, smallest = max(shares), min(shares)
    if not graph.is_scalable:
        if all(share % graph.microbatch == 0 for share in (largest, smallest)) and largest == smallest:
            yield graph.microbatch
        return
    limit = min(largest, max(1, MAX_MICROBATCH_TOKENS // (sequence or 1)))
    sizes = {1 << power for power in range(limit.bit_length())} | {limit}
    yield from (size for size in sorted(sizes) if size <= limit and -(-largest // size) <= smallest)
