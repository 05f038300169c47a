"""The links between devices, and what a collective costs over them.

A collective takes ``latency_s + num_bytes / bytes_per_s`` (Hockney's model). Where a curve was measured it counts;
elsewhere the cost follows from the link levels that the group crosses:

    latency_s    Σ over levels   rounds × ceil(log2(parts that the level joins)) × the level's latency_s
                 where steps of a ring are known and the collective goes round one (all_gather, reduce_scatter, broadcast):
                 latency_s of the innermost level + Σ over levels   links of the ring over the level × its step_s
    bytes_per_s  min over levels   the level's bytes_per_s × lanes / traffic

``traffic`` is what a rank sends for each byte of the tensor, the ring's optimum (Patarasuk and Yuan, "Bandwidth
optimal all-reduce algorithms", 2009), and ``lanes`` is how many ranks of the group sit in each part, since each brings
its own link:

      node 0        node 1            group {0..7}: 2 parts, 4 lanes over the network
    0  1  2  3 ── 4  5  6  7          group {0, 4}: 2 parts, 1 lane

A ring of all eight takes seven steps, one of them over the network: NCCL sums by trees too, but gathers and scatters by rings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, get_args

from shardstage.cluster.table import Table
from shardstage.errors import ClusterError

__all__ = [
    "CollectiveCurve",
    "CollectiveKind",
    "Crossing",
    "LinearCost",
    "LinkLevel",
    "derived_cost",
    "rescaled_cost",
]

CollectiveKind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "p2p"]


class LinearCost(NamedTuple):
    """``seconds(num_bytes) = latency_s + num_bytes / bytes_per_s``; an infinite rate for a group of one."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, num_bytes: float) -> float:
        return self.latency_s + num_bytes / self.bytes_per_s

    def to_table(self) -> dict[str, Any]:
        return self._asdict()

    @staticmethod
    def from_table(table: Table) -> LinearCost:
        cost = LinearCost(table.number("latency_s"), table.number("bytes_per_s"))
        table.done()
        return cost


@dataclass(frozen=True, kw_only=True)
class LinkLevel:
    """One level of the tree: joins ``size`` parts, which are devices at the innermost level and else whole groups of
    the level below. ``latency_s`` is one hop; ``bytes_per_s`` is what one device sends while it receives as much. ``step_s`` is the latency
    of one step of a ring over the level, where it is known."""

    name: str
    size: int
    latency_s: float
    bytes_per_s: float
    source: str
    step_s: float | None = None

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ClusterError(
                f"level {self.name!r} must join at least one part, not {self.size}", hint="size = 8"
            )
        if not (self.latency_s >= 0 and self.bytes_per_s > 0):
            raise ClusterError(
                f"level {self.name!r} must have latency_s >= 0 and bytes_per_s > 0, "
                f"not {self.latency_s} and {self.bytes_per_s}",
                hint="latency_s = 5e-6\nbytes_per_s = 5e10",
            )
        if self.step_s is not None and self.step_s < 0:
            raise ClusterError(
                f"level {self.name!r} must have step_s >= 0, not {self.step_s}", hint="step_s = 2e-6"
            )

    def to_table(self) -> dict[str, Any]:
        names = ("name", "size", "latency_s", "bytes_per_s", "source")
        step = {} if self.step_s is None else {"step_s": self.step_s}
        return {**{name: getattr(self, name) for name in names}, **step}

    @staticmethod
    def from_table(table: Table) -> LinkLevel:
        level = LinkLevel(
            name=table.text("name"),
            size=table.integer("size"),
            latency_s=table.number("latency_s"),
            bytes_per_s=table.number("bytes_per_s"),
            source=table.text("source"),
            step_s=table.number("step_s") if table.has("step_s") else None,
        )
        table.done()
        return level


@dataclass(frozen=True, kw_only=True)
class CollectiveCurve:
    """A measured collective over ``group`` neighbouring ranks, while all other ranks do the same in their groups."""

    kind: CollectiveKind
    group: int
    latency_s: float
    bytes_per_s: float
    source: str

    def __post_init__(self) -> None:
        require_kind(self.kind)
        if self.group < 2 or not (self.latency_s >= 0 and self.bytes_per_s > 0):
            raise ClusterError(
                f"the {self.kind} curve of {self.group} ranks needs group >= 2, latency_s >= 0 and bytes_per_s > 0, "
                f"not {self.latency_s} and {self.bytes_per_s}",
                hint="group = 8\nlatency_s = 5e-6\nbytes_per_s = 5e10",
            )

    def to_table(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("kind", "group", "latency_s", "bytes_per_s", "source")}

    @staticmethod
    def from_table(table: Table) -> CollectiveCurve:
        curve = CollectiveCurve(
            kind=require_kind(table.text("kind")),
            group=table.integer("group"),
            latency_s=table.number("latency_s"),
            bytes_per_s=table.number("bytes_per_s"),
            source=table.text("source"),
        )
        table.done()
        return curve


class Crossing(NamedTuple):
    """A level that a group crosses: ``depth`` levels below it, ``parts`` joined by it, ``lanes`` ranks in each part."""

    level: LinkLevel
    depth: int
    parts: int
    lanes: int


def derived_cost(kind: CollectiveKind, num_ranks: int, crossed: Sequence[Crossing]) -> LinearCost:
    """What follows from the levels alone."""
    rule = _RULES[kind]
    latency_s = _ring_latency_s(num_ranks, crossed) if kind in _RINGS else None
    if latency_s is None:
        latency_s = sum(
            rule.rounds * _hops(kind, crossing.parts) * crossing.level.latency_s for crossing in crossed
        )
    seconds_per_byte = max(_seconds_per_byte(kind, num_ranks, crossing) for crossing in crossed)
    return LinearCost(latency_s, 1 / seconds_per_byte)


def _ring_latency_s(num_ranks: int, crossed: Sequence[Crossing]) -> float | None:
    """Of n - 1 steps round a ring that enters each part once; None where steps of a level are not known.

    A level that joins parts of ``lanes`` ranks is stepped over as often as there are parts, but for those that outer levels join.
    """
    latency_s, units = crossed[0].level.latency_s, num_ranks - 1
    for crossing, outer in zip(crossed, [*crossed[1:], None], strict=True):
        if crossing.level.step_s is None:
            return None
        further = 0 if outer is None else min(units, -(-num_ranks // max(1, outer.lanes)) - 1)
        latency_s += (units - further) * crossing.level.step_s
        units = further
    return latency_s


def rescaled_cost(curve: CollectiveCurve, num_ranks: int) -> LinearCost:
    """A curve measured over ``curve.group`` ranks, for another number of ranks over the same links."""
    if curve.group == num_ranks:
        return LinearCost(curve.latency_s, curve.bytes_per_s)
    traffic = _RULES[curve.kind].traffic
    hops_ratio = _hops(curve.kind, num_ranks) / _hops(curve.kind, curve.group)
    return LinearCost(
        curve.latency_s * hops_ratio, curve.bytes_per_s * traffic(curve.group) / traffic(num_ranks)
    )


def require_kind(kind: str) -> CollectiveKind:
    """The kind itself; ClusterError when it is none."""
    for known in get_args(CollectiveKind):
        if kind == known:
            return known  # type: ignore[no-any-return]
    raise ClusterError(f"unknown collective {kind!r}", hint=f"one of {', '.join(get_args(CollectiveKind))}")


class _Rule(NamedTuple):
    rounds: int
    traffic: Callable[[int], float]


def _all_but_own(num_ranks: int) -> float:
    return (num_ranks - 1) / num_ranks


_RULES: Final[dict[CollectiveKind, _Rule]] = {
    "all_reduce": _Rule(2, lambda num_ranks: 2 * _all_but_own(num_ranks)),
    "all_gather": _Rule(1, _all_but_own),
    "reduce_scatter": _Rule(1, _all_but_own),
    "all_to_all": _Rule(1, _all_but_own),
    "broadcast": _Rule(1, lambda _: 1.0),
    "p2p": _Rule(1, lambda _: 1.0),
}


_RINGS: Final = frozenset({"all_gather", "reduce_scatter", "broadcast"})


def _hops(kind: CollectiveKind, parts: int) -> int:
    return 1 if kind == "p2p" else math.ceil(math.log2(parts))


def _seconds_per_byte(kind: CollectiveKind, num_ranks: int, crossing: Crossing) -> float:
    if kind == "all_to_all":  # what goes to ranks outside the own part leaves over the own link
        return (num_ranks - crossing.lanes) / num_ranks / crossing.level.bytes_per_s
    return _RULES[kind].traffic(num_ranks) / (crossing.level.bytes_per_s * crossing.lanes)
