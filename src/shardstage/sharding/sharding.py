"""``Sharding``: where every value of a graph lies along the tensor-parallel axis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from shardstage.graph import ModelGraph
from shardstage.layout import Placement
from shardstage.sharding.state import Placing

__all__ = ["Conversion", "Sharding", "Unsharded"]


class Unsharded(NamedTuple):
    """An op that every rank runs whole although it has work to share: the user's line, and why."""

    op: str
    source: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """A value that lies one way and is needed in another, before ``anchor`` runs."""

    value: str
    source: Placement
    target: Placement
    anchor: str


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """The decisions of ``shard``: plain data, equal on every rank.

    ``placements`` are those of the graph's values, ``placings`` how each op runs, ``conversions`` what moves between ops (in order), and
    ``parameters`` where each parameter lies, by its fqn: whoever holds one as R has its gradient summed over the axis once a step.
    ``unsharded`` lists the ops that every rank runs whole although they have weights or work.
    """

    graph: ModelGraph
    num_ranks: int
    is_sequence_parallel: bool
    placements: Mapping[str, Placement]
    placings: Mapping[str, Placing]
    conversions: tuple[Conversion, ...]
    parameters: Mapping[str, Placement]
    unsharded: tuple[Unsharded, ...]
