"""``Mesh``: the ranks of a job as coordinates on named axes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

__all__ = ["AXES", "Axis", "Mesh"]

Axis = Literal["pp", "dp", "tp"]
AXES: tuple[Axis, ...] = ("pp", "dp", "tp")
"""Outermost first: neighbours along tp have neighbouring ranks, so that the axis that talks most stays within a host."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mesh:
    """Sizes of the axes; ``rank = (pp * dp_size + dp) * tp_size + tp``."""

    pp: int = 1
    dp: int = 1
    tp: int = 1

    @property
    def world_size(self) -> int:
        return self.pp * self.dp * self.tp

    def size(self, axis: Axis) -> int:
        return int(getattr(self, axis))

    def coordinate(self, rank: int, axis: Axis) -> int:
        """Position of ``rank`` along ``axis``."""
        return rank // self._stride(axis) % self.size(axis)

    def rank(self, *, pp: int = 0, dp: int = 0, tp: int = 0) -> int:
        return (pp * self.dp + dp) * self.tp + tp

    def group(self, rank: int, axis: Axis) -> tuple[int, ...]:
        """The ranks that differ from ``rank`` only along ``axis``, in order, itself included."""
        first = rank - self.coordinate(rank, axis) * self._stride(axis)
        return tuple(first + i * self._stride(axis) for i in range(self.size(axis)))

    def groups(self, axis: Axis) -> tuple[tuple[int, ...], ...]:
        """All groups of an axis, each once, by their first rank."""
        return tuple(dict.fromkeys(self.group(rank, axis) for rank in range(self.world_size)))

    def _stride(self, axis: Axis) -> int:
        inner = AXES[AXES.index(axis) + 1 :]
        return math.prod(self.size(a) for a in inner)
