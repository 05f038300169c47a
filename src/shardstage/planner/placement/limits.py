"""How many devices there are, and what they can hold."""

from __future__ import annotations

from dataclasses import dataclass

from shardstage.errors import PlanError
from shardstage.planner.placement.clusters import Clusters, cluster
from shardstage.planner.placement.graph import PlacementGraph

__all__ = ["Limits"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """``num_devices`` accelerators of ``memory_limit_bytes`` each, and ``num_hosts`` hosts that pay no communication and hold anything."""

    num_devices: int
    num_hosts: int
    memory_limit_bytes: float

    def __post_init__(self) -> None:
        if self.num_devices < 1 or self.num_hosts < 0:
            raise PlanError(
                f"{self.num_devices} devices and {self.num_hosts} hosts cannot run a graph",
                hint="num_devices = 1",
            )

    def is_memory_tight(self, graph: PlacementGraph) -> bool:
        """Whether one device could not hold everything."""
        return sum(graph.memory_bytes) > self.memory_limit_bytes

    def clusters(self, graph: PlacementGraph, *, is_ordered: bool) -> Clusters:
        """The clusters of ``graph`` under these limits."""
        return cluster(graph, is_memory_tight=self.is_memory_tight(graph), is_ordered=is_ordered)
