"""``Mesh``: the ranks of a job as coordinates on named axes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

__all__ = ["AXES", "Axis", "Mesh"]

Axis = Literal["pp", "dp", "cp", "tp"]
AXES: tuple[Axis, ...] = ("pp", "dp", "cp", "tp")
"""Outermost first: neighbours along tp have neighbouring ranks, so that the axis that talks most stays within a host."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mesh:
    """Sizes of the axes, and their order over the ranks, outermost first.

        rank = ((pp * dp_size + dp) * cp_size + cp) * tp_size + tp        in the usual order

    ``cp`` cuts the sequence; its ranks hold equal parameters, as those of dp do.
    """

    pp: int = 1
    dp: int = 1
    tp: int = 1
    cp: int = 1
    order: tuple[Axis, ...] = AXES

    @property
    def world_size(self) -> int:
        return self.pp * self.dp * self.cp * self.tp

    @property
    def num_replicas(self) -> int:
        """How many ranks hold the same parameters, before any ZeRO: those of dp and cp."""
        return self.dp * self.cp

    def size(self, axis: Axis) -> int:
        return int(getattr(self, axis))

    def stride(self, axis: Axis) -> int:
        """How many ranks further the next one along ``axis`` is."""
        if self.order == AXES:  # asked for very often
            return {"tp": 1, "cp": self.tp, "dp": self.tp * self.cp}.get(axis, self.tp * self.cp * self.dp)
        inner = self.order[self.order.index(axis) + 1 :]
        return math.prod(self.size(a) for a in inner)

    def coordinate(self, rank: int, axis: Axis) -> int:
        """Position of ``rank`` along ``axis``."""
        return rank // self.stride(axis) % self.size(axis)

    def rank(self, *, pp: int = 0, dp: int = 0, cp: int = 0, tp: int = 0) -> int:
        if self.order == AXES:  # asked for very often
            return ((pp * self.dp + dp) * self.cp + cp) * self.tp + tp
        places: tuple[tuple[Axis, int], ...] = (("pp", pp), ("dp", dp), ("cp", cp), ("tp", tp))
        return sum(place * self.stride(axis) for axis, place in places)

    def group(self, rank: int, axis: Axis) -> tuple[int, ...]:
        """The ranks that differ from ``rank`` only along ``axis``, in order, itself included."""
        stride = self.stride(axis)
        first = rank - self.coordinate(rank, axis) * stride
        return tuple(first + i * stride for i in range(self.size(axis)))

    def groups(self, axis: Axis) -> tuple[tuple[int, ...], ...]:
        """All groups of an axis, each once, by their first rank."""
        return tuple(dict.fromkeys(self.group(rank, axis) for rank in range(self.world_size)))
