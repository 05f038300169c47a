"""How many devices there are, and what they can hold."""

from __future__ import annotations

import math
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
        """The clusters of ``graph`` under these limits; PlanError where one of them has no device that may run it."""
        if not self.num_hosts and not all(graph.on_accelerator):
            raise PlanError(
                f"node {graph.on_accelerator.index(False)} runs only on a host, and there is none",
                hint="num_hosts = 1",
            )
        return cluster(graph, is_memory_tight=self.is_memory_tight(graph), is_ordered=is_ordered)

    def hosts_in_devices(self, clusters: Clusters, num_hosts: int) -> float:
        """How many accelerators ``num_hosts`` hosts are worth at most: by the cluster that a host does relatively best."""
        is_work = clusters.on_accelerator & (clusters.compute_s > 0)
        if not num_hosts or not is_work.any():
            return 0.0
        host_s, device_s = clusters.host_compute_s[is_work], clusters.compute_s[is_work]
        return num_hosts * float(math.inf if (host_s == 0).any() else (device_s / host_s).max())
