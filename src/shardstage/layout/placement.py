"""The placement of a tensor along one mesh axis, uneven pieces included."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

__all__ = ["Interval", "Partial", "Placement", "Replicate", "Shard", "balanced_sizes"]

Interval = tuple[int, int]
"""Indices ``start <= i < stop`` along one tensor dim."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Replicate:
    """Every rank of the axis holds the whole tensor.

    ``has_partial_grad`` says what the *gradient* of this tensor is on each rank: the whole gradient (False), or one summand of it,
    because the tensor feeds sharded computation (True). The letters of spmd_types for the two are I and R.
    """

    has_partial_grad: bool = False

    def __str__(self) -> str:
        return "R" if self.has_partial_grad else "I"


@dataclass(frozen=True, kw_only=True, slots=True)
class Partial:
    """Every rank holds one summand; the tensor is their sum. Its gradient is the whole gradient on every rank."""

    def __str__(self) -> str:
        return "P"


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """Tensor dim ``dim`` is cut among the ranks of the axis, evenly or not.

    The dim is a concatenation of ``sections`` (one, or several where a weight is fused: Q, K and V), and each section is cut on its own:
    ``sections[k][r]`` is the number of elements of section k on rank r. A rank holds its parts of all sections, in order:

        dim      | q q q q q q | k k k k k k | v v v v v v |     sections = ((4, 2), (4, 2), (4, 2))
        rank 0     q q q q       k k k k       v v v v
        rank 1             q q           k k           v v
    """

    dim: int
    sections: tuple[tuple[int, ...], ...]

    @property
    def num_ranks(self) -> int:
        return len(self.sections[0])

    @property
    def length(self) -> int:
        """Elements of the whole dim."""
        return sum(map(sum, self.sections))

    def size(self, rank: int) -> int:
        """Elements of the dim that ``rank`` holds."""
        return sum(section[rank] for section in self.sections)

    def sizes(self) -> tuple[int, ...]:
        return tuple(self.size(rank) for rank in range(self.num_ranks))

    def intervals(self, rank: int) -> tuple[Interval, ...]:
        """The parts of the whole dim that ``rank`` holds, one for each section, empty ones included."""
        found: list[Interval] = []
        section_start = 0
        for section in self.sections:
            start = section_start + sum(section[:rank])
            found.append((start, start + section[rank]))
            section_start += sum(section)
        return tuple(found)

    def with_dim(self, dim: int) -> Shard:
        return Shard(dim=dim, sections=self.sections)

    def __str__(self) -> str:
        return f"S({self.dim}: {' + '.join('/'.join(map(str, section)) for section in self.sections)})"


Placement = Replicate | Partial | Shard


def balanced_sizes(length: int, num_ranks: int, *, unit: int = 1) -> tuple[int, ...]:
    """``length`` cut into ``num_ranks`` sizes that differ by at most one ``unit``, larger ones first.

    Every size is a multiple of ``unit`` (a head, say); ``length`` must be one too. A rank may get nothing.
    """
    if length % unit:
        raise ValueError(f"{length} is not a multiple of the unit {unit}")
    units, more = divmod(length // unit, num_ranks)
    return tuple(unit * (units + (rank < more)) for rank in range(num_ranks))


def offsets(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Where each piece starts."""
    return (0, *accumulate(sizes))[: len(sizes)]
