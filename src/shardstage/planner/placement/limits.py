"""What the devices can hold, and a stage time that no placement can beat."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from shardstage.errors import PlanError
from shardstage.planner.placement.clusters import Clusters, cluster
from shardstage.planner.placement.graph import PlacementGraph

__all__ = ["Limits", "lower_bound", "lower_bound_s"]


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


def lower_bound(
    graph: PlacementGraph, num_devices: int, *, num_hosts: int = 0, memory_limit_bytes: float = math.inf
) -> float:
    """A stage time in seconds that no placement, contiguous or not, can beat."""
    limits = Limits(num_devices=num_devices, num_hosts=num_hosts, memory_limit_bytes=memory_limit_bytes)
    clusters = cluster(graph, is_memory_tight=limits.is_memory_tight(graph), is_ordered=False)
    return lower_bound_s(clusters, limits, below_s=math.inf)


def lower_bound_s(clusters: Clusters, limits: Limits, *, below_s: float) -> float:
    """The larger of the mean and the largest load of one cluster, on the kind of device that is faster for it."""
    least_s = np.where(clusters.on_accelerator, clusters.compute_s, clusters.host_compute_s)
    if limits.num_hosts:
        least_s = np.minimum(least_s, clusters.host_compute_s)
    return float(max(least_s.sum() / (limits.num_devices + limits.num_hosts), least_s.max(initial=0.0)))
