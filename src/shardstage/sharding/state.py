"""What sharding knows of a value while it walks the graph, and how a rule says what it wants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from shardstage.layout import Partial, Placement, Replicate, Shard

__all__ = ["PARTIAL", "SUMMED", "WHOLE", "Blocked", "Origin", "Placing", "Reconsider", "Refine", "State"]

WHOLE = Replicate()
"""I: the whole tensor, its gradient whole on every rank."""

SUMMED = Replicate(has_partial_grad=True)
"""R: the whole tensor, its gradient one summand on each rank."""

PARTIAL = Partial()


@dataclass(frozen=True, slots=True)
class Origin:
    """The parameter whose cut a sharded value inherits.

    One element of the value's sharded dim stands for ``scale`` elements of the parameter's cut dim, and the value holds that dim's
    sections from ``first`` up to ``last``.
    """

    parameter: str
    scale: Fraction
    first: int
    last: int

    def scaled(self, factor: Fraction) -> Origin:
        return Origin(self.parameter, self.scale * factor, self.first, self.last)


@dataclass(frozen=True, slots=True)
class State:
    """Placement of a value, and the parameters that caused it; without any, a shard may be gathered at will."""

    placement: Placement = WHOLE
    origins: tuple[Origin, ...] = ()

    @property
    def shard(self) -> Shard | None:
        return self.placement if isinstance(self.placement, Shard) else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Placing:
    """How one op runs on every rank.

    ``inputs`` are the placements that it needs of the values it reads; ``outputs`` what it yields; ``form`` tells apart the ways in
    which its local version can be written. A Partial output is turned into ``reduced`` at once, and then ``bias`` is added;
    unless ``is_deferred``: then the ops that follow are linear and work on the summand of each rank, until one reduces it.
    """

    inputs: Mapping[str, Placement] = field(default_factory=dict)
    outputs: tuple[State, ...] = ()
    form: str = ""
    reduced: Placement = WHOLE
    bias: str = ""
    is_deferred: bool = False

    @property
    def results(self) -> tuple[State, ...]:
        """States of the outputs once partial sums are reduced."""
        if self.is_deferred:
            return self.outputs
        return tuple(State(self.reduced) if isinstance(s.placement, Partial) else s for s in self.outputs)


class Reconsider(Exception):
    """A rule cannot run with its inputs cut as they are: ``values`` must be cut otherwise."""

    def __init__(self, values: tuple[str, ...], reason: str) -> None:
        super().__init__(reason)
        self.values = values
        self.reason = reason


class Blocked(Reconsider):
    """The values must be whole."""


class Refine(Reconsider):
    """The value's sharded dim must be cut at multiples of ``unit``, and each piece between ``boundaries`` on its own."""

    def __init__(self, value: str, reason: str, *, unit: int = 1, boundaries: tuple[int, ...] = ()) -> None:
        super().__init__((value,), reason)
        self.unit = unit
        self.boundaries = boundaries
