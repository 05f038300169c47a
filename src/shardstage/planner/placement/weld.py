"""What must share a device in every placement faster than a given time; and from that, times that cannot be beaten.

Suppose a placement is faster than t. If net n were cut, the device of a cluster g of n would be loaded with compute(g) + cost(n), or,
were it a host, with host_compute(g). Where both reach t, n cannot be cut: its clusters are one from now on, with all their compute, and
so on. Where one of them reaches t by itself in the end, there is no such placement, and t is a lower bound.
"""

from __future__ import annotations

import math

import numpy as np

from shardstage.planner.placement.clusters import Clusters, Ints, merge
from shardstage.planner.placement.graph import PlacementGraph
from shardstage.planner.placement.limits import Limits

__all__ = ["lower_bound", "lower_bound_s", "weld"]


def weld(clusters: Clusters, limits: Limits, *, below_s: float) -> tuple[Clusters, Ints] | None:
    """The graph with what shares a device in every placement faster than ``below_s`` joined, and where each cluster went.

    None if there is no such placement.
    """
    groups = _groups(clusters, limits, below_s)
    return None if groups is None else merge(clusters, groups)


def lower_bound(
    graph: PlacementGraph, num_devices: int, *, num_hosts: int = 0, memory_limit_bytes: float = math.inf
) -> float:
    """A stage time in seconds that no placement, contiguous or not, can beat."""
    limits = Limits(num_devices=num_devices, num_hosts=num_hosts, memory_limit_bytes=memory_limit_bytes)
    return lower_bound_s(limits.clusters(graph, is_ordered=False), limits, below_s=math.inf)


def lower_bound_s(clusters: Clusters, limits: Limits, *, below_s: float) -> float:
    """The larger of the mean load and the largest time, up to ``below_s``, that refutes itself; to one part in 10,000."""
    work_s = np.where(clusters.on_accelerator, clusters.compute_s, 0.0)
    least_s = np.where(clusters.on_accelerator, clusters.compute_s, clusters.host_compute_s)
    if limits.num_hosts:
        least_s = np.minimum(least_s, clusters.host_compute_s)
    mean_s = work_s.sum() / (limits.num_devices + limits.hosts_in_devices(clusters, limits.num_hosts))
    low_s = float(max(mean_s, least_s.max(initial=0.0)))
    one_device_s = np.where(clusters.on_accelerator, clusters.compute_s, math.inf).sum()
    one_host_s = clusters.host_compute_s.sum() if limits.num_hosts else math.inf
    high_s = min(below_s, float(one_device_s), float(one_host_s))  # all on one device: nothing is cut
    if low_s >= high_s:
        return low_s
    if _groups(clusters, limits, high_s) is None:
        return high_s
    while high_s - low_s > 1e-4 * low_s:
        middle_s = (low_s + high_s) / 2
        if _groups(clusters, limits, middle_s) is None:
            low_s = middle_s
        else:
            high_s = middle_s
    return low_s


def _groups(clusters: Clusters, limits: Limits, time_s: float) -> list[int] | None:
    """A representative of each cluster's group, or None where "faster than ``time_s``" refutes itself."""
    device_s = np.where(clusters.on_accelerator, clusters.compute_s, math.inf).tolist()
    host_s = clusters.host_compute_s.tolist() if limits.num_hosts else [math.inf] * len(clusters)
    if any(min(pair) >= time_s for pair in zip(device_s, host_s, strict=True)):
        return None
    group = list(range(len(clusters)))
    left = sorted(zip(clusters.net_cost_s.tolist(), clusters.nets, strict=True), reverse=True)
    grew = True
    while grew:
        grew = False
        cuttable = []
        for cost_s, net in left:
            touched = {_find(group, one) for one in net}
            if all(device_s[one] + cost_s < time_s or host_s[one] < time_s for one in touched):
                cuttable.append((cost_s, net))
                continue
            into, *others = touched
            for one in others:
                group[one] = into
                device_s[into] += device_s[one]
                host_s[into] += host_s[one]
            if min(device_s[into], host_s[into]) >= time_s:
                return None
            grew = True
        left = cuttable
    return [_find(group, one) for one in range(len(clusters))]


def _find(group: list[int], one: int) -> int:
    while group[one] != one:
        group[one] = group[group[one]]
        one = group[one]
    return one
