"""How each parameter's cut dim is divided: chosen fine at first, and coarser as the walk meets what depends on it."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from math import lcm

from shardstage.layout import Shard, balanced_sizes
from shardstage.sharding.state import Blocked, Origin, Reconsider, Refine

__all__ = ["Cut", "Cuts"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """Lengths of the sections of a dim, and the unit within each that is never divided."""

    sections: tuple[int, ...]
    units: tuple[int, ...]

    def shard(self, dim: int, num_ranks: int) -> Shard:
        pieces = zip(self.sections, self.units, strict=True)
        return Shard(
            dim=dim, sections=tuple(balanced_sizes(length, num_ranks, unit=unit) for length, unit in pieces)
        )

    def with_boundaries(self, boundaries: set[int]) -> Cut | None:
        """Sections divided at further places, units to be found anew; None where a place lies outside."""
        ends = set(accumulate(self.sections))
        wanted = sorted(boundaries | ends)
        if wanted[0] <= 0 or wanted[-1] != max(ends):
            return None
        if boundaries <= ends:
            return self
        sections = tuple(b - a for a, b in zip((0, *wanted), wanted, strict=False))
        return Cut(sections=sections, units=(1,) * len(sections))

    def with_unit(self, unit: int, first: int, last: int) -> Cut | None:
        """The unit of some sections made a multiple of ``unit``; None where it does not divide them."""
        units = tuple(lcm(u, unit) if first <= i < last else u for i, u in enumerate(self.units))
        fits = all(length % u == 0 for length, u in zip(self.sections, units, strict=True))
        return Cut(sections=self.sections, units=units) if fits else None


class Cuts:
    """The cut of every parameter that may be cut, and why the others may not.

    A reconsideration divides a dim into more sections or makes their units larger, so that a walk that starts again after each comes
    to an end.
    """

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.whole: dict[str, str] = {}
        self._cuts: dict[str, Cut] = {}
        self._dims: dict[str, int] = {}

    def keep_whole(self, parameter: str, reason: str) -> None:
        self.whole.setdefault(parameter, reason)

    def shard(self, parameter: str, dim: int, length: int) -> Shard | None:
        """The dim of the parameter cut among the ranks; None where it must stay whole."""
        if parameter in self.whole or self._dims.setdefault(parameter, dim) != dim:
            return None
        whole = Cut(sections=(length,), units=(1,))
        return self._cuts.setdefault(parameter, whole).shard(dim, self.num_ranks)

    def origin(self, parameter: str) -> Origin:
        return Origin(parameter, Fraction(1), 0, len(self._cuts[parameter].sections))

    def unit(self, origin: Origin) -> int:
        """Elements of a value with this origin that are never divided."""
        units = self._cuts[origin.parameter].units[origin.first : origin.last]
        return max(1, int(lcm(*units) / origin.scale))

    def reconsider(self, request: Reconsider, origins: tuple[Origin, ...]) -> tuple[str, ...]:
        """Does what a rule asks; the parameters whose cut has changed."""
        for origin in origins:
            old = self._cuts[origin.parameter]
            new = None if isinstance(request, Blocked) else _refined(old, request, origin)
            if new is None or new == old:
                self.keep_whole(origin.parameter, str(request))
            else:
                self._cuts[origin.parameter] = new
        return tuple(origin.parameter for origin in origins)


def _refined(cut: Cut, request: Reconsider, origin: Origin) -> Cut | None:
    assert isinstance(request, Refine)
    refined: Cut | None = cut
    if request.boundaries:
        boundaries = {b * origin.scale for b in request.boundaries}
        if origin.last - origin.first != len(cut.sections) or any(b.denominator > 1 for b in boundaries):
            return None
        refined = cut.with_boundaries({int(b) for b in boundaries})
    if refined is not None and request.unit > 1:
        unit = (origin.scale * request.unit).numerator
        refined = refined.with_unit(unit, origin.first, origin.last)
    return refined
