"""Coarser graphs, so that one move carries a whole neighbourhood.

clusters ─ merge ─▶ coarser ─ merge ─▶ coarsest          heaviest nets first; never across devices of a given placement
    ◀─ refine ─ project ◀─ refine ─ project ◀─ refine     annealing on every level
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from shardstage.planner.placement.anneal import anneal
from shardstage.planner.placement.clusters import Clusters, Ints, merge
from shardstage.planner.placement.limits import Limits
from shardstage.planner.placement.refine import Standing

__all__ = ["coarsen", "v_cycle"]


def v_cycle(
    clusters: Clusters,
    limits: Limits,
    start: Ints | None,
    *,
    keep_apart: Ints | None = None,
    proposals: int,
    coarsest: int,
    rng: np.random.Generator,
) -> Standing:
    """The best placement found through coarser graphs from ``start``, never worse than that; or from nothing where it is None.

    ``keep_apart``: a second placement whose cuts the coarser graphs respect as well, so that parts of the two can be combined. Half of the
    ``proposals`` are made on the coarsest graph. How hot, and for which power of the loads, is drawn: no setting is best for all graphs.
    """
    power, hot = int(rng.choice([4, 8, 16])), float(rng.choice([0.03, 0.1, 0.3]))
    graph, device_of = clusters, np.zeros(len(clusters), dtype=np.int64) if start is None else start
    apart = (
        device_of if keep_apart is None else device_of * (limits.num_devices + limits.num_hosts) + keep_apart
    )
    levels: list[tuple[Clusters, Ints]] = []  # (finer, its map to the coarser)
    while len(graph) > coarsest:
        coarser, parent = coarsen(graph, apart, num_devices=limits.num_devices + limits.num_hosts, rng=rng)
        if len(coarser) > 0.95 * len(graph):
            break
        levels.append((graph, parent))
        first_of = np.unique(parent, return_index=True)[1]
        graph, device_of, apart = coarser, device_of[first_of], apart[first_of]
    if start is None:
        device_of = _grown(graph, limits, rng)
    best = anneal(graph, limits, device_of, proposals=proposals // 2, hot=hot, power=power, rng=rng)
    each = proposals // (2 * max(1, len(levels)))
    for finer, parent in reversed(levels):
        best = anneal(finer, limits, best.device_of[parent], proposals=each, hot=0.03, power=power, rng=rng)
    return best


def _grown(clusters: Clusters, limits: Limits, rng: np.random.Generator) -> Ints:
    """Device after device is filled to its share of the compute, each time with the cluster most tied to what it has."""
    ties = (
        clusters.incidence
        * (clusters.net_cost_s / np.maximum(clusters.net_sizes - 1, 1))
        @ clusters.incidence.T
    )
    device_of = np.where(clusters.on_accelerator, limits.num_devices - 1, limits.num_devices)
    is_free = clusters.on_accelerator.copy()
    for device in range(limits.num_devices - 1):
        share_s = clusters.compute_s[is_free].sum() / (limits.num_devices - device)
        tie_s = rng.random(len(clusters)) * 1e-12
        held_s = 0.0
        while is_free.any() and held_s < share_s:
            one = int(np.argmax(np.where(is_free, tie_s, -1.0)))
            if held_s > 0 and held_s + clusters.compute_s[one] / 2 > share_s:
                break
            device_of[one] = device
            is_free[one] = False
            held_s += float(clusters.compute_s[one])
            tie_s += ties[one]
    return device_of


def coarsen(
    clusters: Clusters, device_of: Ints, *, num_devices: int, rng: np.random.Generator
) -> tuple[Clusters, Ints]:
    """The graph with neighbours on one device merged in pairs, and the coarse cluster of each cluster.

    A cluster joins the neighbour with which it shares the costliest nets, Σ cost / (size - 1), give or take a third by
    chance; no pair carries more than a half, a quarter or an eighth (drawn) of a device's share of the compute.
    """
    largest_s = max(clusters.compute_s.sum() / num_devices / float(rng.choice([2, 4, 8])), 1e-300)
    nets_of: list[list[tuple[float, tuple[int, ...]]]] = [[] for _ in range(len(clusters))]
    for net, cost_s in zip(clusters.nets, clusters.net_cost_s.tolist(), strict=True):
        for one in net:
            nets_of[one].append((cost_s / (len(net) - 1), net))
    compute_s: list[float] = clusters.compute_s.tolist()
    kind = list(zip(device_of.tolist(), clusters.on_accelerator.tolist(), strict=True))
    parent = [-1] * len(clusters)
    for one in rng.permutation(len(clusters)).tolist():
        if parent[one] >= 0:
            continue
        parent[one] = one
        rating: dict[int, float] = defaultdict(float)
        for rated, net in nets_of[one]:
            for other in net:
                if (
                    parent[other] < 0
                    and kind[other] == kind[one]
                    and compute_s[one] + compute_s[other] <= largest_s
                ):
                    rating[other] += rated
        if rating:
            noise = (0.7 + 0.6 * rng.random(len(rating))).tolist()
            parent[max(zip(rating, noise, strict=True), key=lambda pair: rating[pair[0]] * pair[1])[0]] = one
    return merge(clusters, parent)
