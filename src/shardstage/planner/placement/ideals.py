"""Ideals: the sets of clusters that hold, with each cluster, all that must come before it. What a pipeline has done after some stages.

A contiguous set is the difference of two ideals; an ideal is the int whose bit c says that cluster c is in.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import numpy as np

from shardstage.planner.placement.clusters import Clusters

__all__ = ["all_ideals", "given_order", "linear_orders", "prefixes"]


def all_ideals(clusters: Clusters, *, at_most: int) -> list[int] | None:
    """Every ideal, smaller ones first; None where there are more than ``at_most``."""
    needs, feeds = _neighbours(clusters)
    level = {
        0: sum(1 << one for one in range(len(clusters)) if not needs[one])
    }  # ideal → clusters that can join it
    found: list[int] = []
    while level:
        found.extend(level)
        grown: dict[int, int] = {}
        for ideal, open_to in level.items():
            rest = open_to
            while rest:
                bit = rest & -rest
                rest ^= bit
                larger = ideal | bit
                if larger not in grown:
                    opened = open_to ^ bit
                    for later in feeds[bit.bit_length() - 1]:
                        if not needs[later] & ~larger:
                            opened |= 1 << later
                    grown[larger] = opened
        if len(found) + len(grown) > at_most:
            return None
        level = grown
    return found


def linear_orders(clusters: Clusters, *, count: int, seed: int) -> Iterator[list[int]]:
    """``count`` topological orders: that of the nodes' numbers, depth first, breadth first, then random ones of either kind."""
    yield given_order(clusters)
    needs, feeds = _neighbours(clusters)
    rng = np.random.default_rng(seed)
    for index in range(count - 1):
        waiting_for = [one.bit_count() for one in needs]
        ready = [one for one in range(len(clusters)) if not waiting_for[one]]
        order = []
        is_depth_first = index % 2 == 0
        while ready:
            if index >= 4 and rng.random() < 0.3:
                place = int(rng.integers(len(ready)))
            else:
                place = len(ready) - 1 if is_depth_first else 0
            one = ready.pop(place)
            order.append(one)
            opened = feeds[one] if index % 4 < 2 else feeds[one][::-1]
            for later in opened:
                waiting_for[later] -= 1
                if not waiting_for[later]:
                    ready.append(later)
        yield order


def given_order(clusters: Clusters) -> list[int]:
    """The topological order that comes closest to that of the nodes' numbers: of what may come next always the cluster of the lowest."""
    needs, feeds = _neighbours(clusters)
    waiting_for = [one.bit_count() for one in needs]
    ready = [(min(nodes), one) for one, nodes in enumerate(clusters.members) if not waiting_for[one]]
    heapq.heapify(ready)
    order = []
    while ready:
        _, one = heapq.heappop(ready)
        order.append(one)
        for later in feeds[one]:
            waiting_for[later] -= 1
            if not waiting_for[later]:
                heapq.heappush(ready, (min(clusters.members[later]), later))
    return order


def prefixes(order: list[int]) -> list[int]:
    """The ideals that a linear order passes through, from none to all."""
    ideals = [0]
    for one in order:
        ideals.append(ideals[-1] | 1 << one)
    return ideals


def _neighbours(clusters: Clusters) -> tuple[list[int], list[list[int]]]:
    """For each cluster the bits of those right before it, and the list of those right after it."""
    needs = [0] * len(clusters)
    feeds: list[list[int]] = [[] for _ in range(len(clusters))]
    for first, last in clusters.before:
        needs[last] |= 1 << first
        feeds[first].append(last)
    return needs, feeds
