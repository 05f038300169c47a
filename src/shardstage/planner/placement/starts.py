"""Placements to start from: good ones from elsewhere, and bad ones that lead elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from shardstage.errors import PlanError
from shardstage.planner.placement.clusters import Clusters, Ints
from shardstage.planner.placement.contiguous import place_contiguous
from shardstage.planner.placement.graph import PlacementGraph
from shardstage.planner.placement.limits import Limits

__all__ = ["first_placements"]


def first_placements(
    graph: PlacementGraph, clusters: Clusters, limits: Limits, given: Mapping[str, Sequence[int]], seed: int
) -> Iterator[tuple[str, Ints]]:
    """Named placements of the clusters: contiguous, those given, METIS where installed, longest first, random."""
    firsts = [nodes[0] for nodes in clusters.members]
    try:
        contiguous = place_contiguous(
            graph,
            limits.num_devices,
            memory_limit_bytes=limits.memory_limit_bytes,
            num_hosts=limits.num_hosts,
            max_ideals=6_000,
            seed=seed,
        )
        yield "contiguous", np.array([contiguous.device_of[node] for node in firsts], dtype=np.int64)
    except PlanError:
        pass  # contiguity and memory together can be impossible where a scattered placement is not
    for name, device_of in given.items():
        yield name, np.array([device_of[node] for node in firsts], dtype=np.int64)
    yield "longest first", _longest_first(clusters, limits, weigh_nets=False)
    yield "longest first with communication", _longest_first(clusters, limits, weigh_nets=True)
    metis = _metis(clusters, limits, seed)
    if metis is not None:
        yield "METIS", metis
    rng = np.random.default_rng(seed)
    for index in range(1):
        scattered = rng.integers(limits.num_devices, size=len(clusters))
        yield f"random {index + 1}", np.where(clusters.on_accelerator, scattered, limits.num_devices)


def _longest_first(clusters: Clusters, limits: Limits, *, weigh_nets: bool) -> Ints:
    """Clusters by falling compute, each to the accelerator where its load, with the nets it brings if asked, is then least."""
    device_of = np.full(len(clusters), limits.num_devices, dtype=np.int64)
    loads_s = np.zeros(limits.num_devices)
    held_bytes = np.zeros(limits.num_devices)
    touched = np.zeros((len(clusters.nets), limits.num_devices), dtype=np.bool_)
    for one in np.argsort(-clusters.compute_s, kind="stable"):
        if not clusters.on_accelerator[one]:
            continue
        nets = np.flatnonzero(clusters.incidence[one])
        brought_s = (
            (clusters.net_cost_s[nets, None] * ~touched[nets]).sum(axis=0)
            if weigh_nets
            else np.zeros(limits.num_devices)
        )
        has_room = held_bytes + clusters.memory_bytes[one] <= limits.memory_limit_bytes
        reached_s = np.where(has_room | ~has_room.any(), loads_s + brought_s, np.inf)
        target = int(np.argmin(reached_s))
        device_of[one] = target
        loads_s[target] += clusters.compute_s[one] + brought_s[target]
        held_bytes[target] += clusters.memory_bytes[one]
        touched[nets, target] = True
    return device_of


def _metis(clusters: Clusters, limits: Limits, seed: int) -> Ints | None:
    """The partition of METIS, through ``pymetis``; None where that is not installed, or the graph is too small for it."""
    try:
        import pymetis
    except ImportError:
        return None
    if (
        limits.num_devices < 2
        or len(clusters) < 2 * limits.num_devices
        or not bool(clusters.on_accelerator.all())
    ):
        return None
    weights = (
        clusters.incidence
        * (clusters.net_cost_s / np.maximum(clusters.net_sizes - 1, 1))
        @ clusters.incidence.T
    )
    np.fill_diagonal(weights, 0.0)
    whole = np.maximum(1, np.round(1e6 * weights / (weights.max() or 1.0))).astype(int)
    starts: list[int] = [0]
    neighbours: list[int] = []
    edge_weights: list[int] = []
    for one, row in enumerate(weights):
        near = np.flatnonzero(row)
        neighbours.extend(int(other) for other in near)
        edge_weights.extend(int(whole[one, other]) for other in near)
        starts.append(len(neighbours))
    sizes = np.round(1e6 * clusters.compute_s / (clusters.compute_s.max() or 1.0)).astype(int)
    _, parts = pymetis.part_graph(
        limits.num_devices,
        xadj=starts,
        adjncy=neighbours,
        vweights=[int(one) for one in sizes],
        eweights=edge_weights,
        options=pymetis.Options(seed=seed),
    )
    return np.array(parts, dtype=np.int64)
