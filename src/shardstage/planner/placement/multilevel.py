"""Coarser graphs, so that one move carries a whole neighbourhood.

clusters ─ merge ─▶ coarser ─ merge ─▶ coarsest          heaviest nets first; never across devices of a given placement
    ◀─ refine ─ project ◀─ refine ─ project ◀─ refine     tabu search on every level
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from shardstage.planner.placement.clusters import Clusters, Ints, merge
from shardstage.planner.placement.limits import Limits
from shardstage.planner.placement.refine import Standing, refine

__all__ = ["coarsen", "v_cycle"]


def v_cycle(
    clusters: Clusters,
    limits: Limits,
    start: Ints,
    *,
    max_moves: int,
    coarsest: int,
    rng: np.random.Generator,
) -> tuple[Standing, int]:
    """The best placement found from ``start`` through coarser graphs, and the moves made. Never worse than ``start``."""
    levels: list[tuple[Clusters, Ints]] = []  # (finer, its map to the coarser)
    graph, device_of = clusters, start
    while len(graph) > coarsest:
        coarser, parent = coarsen(
            graph, device_of, num_devices=limits.num_devices + limits.num_hosts, rng=rng
        )
        if len(coarser) > 0.9 * len(graph):
            break
        levels.append((graph, parent))
        projected = np.zeros(len(coarser), dtype=np.int64)
        projected[parent] = device_of
        graph, device_of = coarser, projected
    each = max(1, max_moves // (len(levels) + 1))
    best, moves = refine(graph, limits, device_of, max_moves=each, patience=max(60, len(graph)), rng=rng)
    for finer, parent in reversed(levels):
        best, made = refine(
            finer, limits, best.device_of[parent], max_moves=each, patience=max(60, len(finer) // 2), rng=rng
        )
        moves += made
    return best, moves


def coarsen(
    clusters: Clusters, device_of: Ints, *, num_devices: int, rng: np.random.Generator
) -> tuple[Clusters, Ints]:
    """The graph with neighbours on one device merged in pairs, and the coarse cluster of each cluster.

    A cluster joins the neighbour with which it shares the costliest nets, Σ cost / (size - 1), by chance among equals; no pair carries more
    than a fifth of a device's share of the compute.
    """
    largest_s = max(clusters.compute_s.sum() / num_devices / 5, 1e-300)
    nets_of: list[list[int]] = [[] for _ in range(len(clusters))]
    for index, net in enumerate(clusters.nets):
        for one in net:
            nets_of[one].append(index)
    parent = np.full(len(clusters), -1, dtype=np.int64)
    num_coarse = 0
    for one in rng.permutation(len(clusters)):
        if parent[one] >= 0:
            continue
        rating: dict[int, float] = defaultdict(float)
        for net in nets_of[one]:
            for other in clusters.nets[net]:
                rating[other] += float(clusters.net_cost_s[net]) / (len(clusters.nets[net]) - 1)
        mates = [
            (rated * (0.7 + 0.6 * rng.random()), other)
            for other, rated in rating.items()
            if other != one
            and parent[other] < 0
            and device_of[other] == device_of[one]
            and _may_join(clusters, int(one), other, largest_s)
        ]
        parent[one] = num_coarse
        if mates:
            parent[max(mates)[1]] = num_coarse
        num_coarse += 1
    return merge(clusters, parent.tolist())


def _may_join(clusters: Clusters, one: int, other: int, largest_s: float) -> bool:
    is_alike = bool(clusters.on_accelerator[one] == clusters.on_accelerator[other])
    return is_alike and float(clusters.compute_s[one] + clusters.compute_s[other]) <= largest_s
