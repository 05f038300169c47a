"""The graph after everything that must, or may without loss, share a device has been put together.

    PlacementGraph ── colocation ──▶ clusters ── cycles ──▶ clusters ── costless leaves ──▶ Clusters

A cluster is what search moves; a net is the set of clusters that touch a tensor; ``before`` is the order that contiguity means.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from shardstage.planner.placement.graph import PlacementGraph

__all__ = ["Clusters", "Floats", "Groups", "Ints", "cluster", "merge"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Clusters:
    """Clusters 0 … n - 1 of a graph; ``members[c]`` are its nodes, ``nets[t]`` the clusters of net t.

    ``before``: pairs (earlier, later).
    """

    members: tuple[tuple[int, ...], ...]
    compute_s: Floats  # [n]
    host_compute_s: Floats  # [n]
    memory_bytes: Floats  # [n]
    on_accelerator: npt.NDArray[np.bool_]  # [n]
    nets: tuple[tuple[int, ...], ...]
    net_cost_s: Floats  # [num_nets]
    before: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.members)

    @cached_property
    def incidence(self) -> Floats:
        """1 where a cluster is on a net: [n, num_nets]."""
        matrix = np.zeros((len(self), len(self.nets)))
        for index, net in enumerate(self.nets):
            matrix[list(net), index] = 1.0
        return matrix

    @cached_property
    def net_sizes(self) -> Floats:
        return np.array([len(net) for net in self.nets], dtype=np.float64)

    def spread(self, device_of_cluster: Sequence[int], num_nodes: int) -> tuple[int, ...]:
        """The device of every node, from the device of every cluster."""
        device_of = [0] * num_nodes
        for nodes, device in zip(self.members, device_of_cluster, strict=True):
            for node in nodes:
                device_of[node] = int(device)
        return tuple(device_of)


def cluster(graph: PlacementGraph, *, is_memory_tight: bool, is_ordered: bool) -> Clusters:
    """The clusters of ``graph``. No placement is lost that could be strictly faster than all that remain.

    ``is_ordered``: contiguity matters, so cycles of clusters are closed up and the order is kept.
    ``is_memory_tight``: the memory limit could bind, so a leaf that holds bytes keeps its freedom.
    """
    groups = Groups(graph.num_nodes)
    first_of: dict[int, int] = {}
    for node, colour in enumerate(graph.colocation):
        if colour is not None:
            groups.join(node, first_of.setdefault(colour, node))
    if is_ordered:
        for component in _strong_components(graph.num_nodes, _order(graph, groups)):
            groups.join_all(component)
    contracted = _contract(graph, groups, is_ordered=is_ordered)
    while leaves := _costless_leaves(contracted, is_memory_tight=is_memory_tight, is_ordered=is_ordered):
        for leaf, onto in leaves:
            groups.join(contracted.members[leaf][0], contracted.members[onto][0])
        contracted = _contract(graph, groups, is_ordered=is_ordered)
    return contracted


def merge(clusters: Clusters, group: Sequence[int]) -> tuple[Clusters, Ints]:
    """The graph in which clusters with the same number in ``group`` are one, and the new cluster of each; cycles so made are closed up."""
    number = {label: index for index, label in enumerate(dict.fromkeys(group))}
    parent = np.array([number[label] for label in group], dtype=np.int64)
    before = {(int(parent[first]), int(parent[last])) for first, last in clusters.before}
    for cycle in _strong_components(
        len(number) if before else 0, ((first, last) for first, last in before if first != last)
    ):
        parent[np.isin(parent, cycle)] = cycle[0]
    parent = np.unique(parent, return_inverse=True)[1].astype(np.int64)
    members: list[list[int]] = [[] for _ in range(int(parent.max(initial=-1)) + 1)]
    for one, into in enumerate(parent.tolist()):
        members[into].extend(clusters.members[one])
    costs: dict[tuple[int, ...], float] = defaultdict(float)
    for net, cost_s in zip(clusters.nets, clusters.net_cost_s.tolist(), strict=True):
        touched = tuple(sorted({int(parent[one]) for one in net}))
        if len(touched) > 1:
            costs[touched] += cost_s
    pairs = {(int(parent[first]), int(parent[last])) for first, last in clusters.before}

    def total(values: npt.NDArray[Any]) -> Floats:
        return np.bincount(parent, weights=values, minlength=len(members)).astype(np.float64)

    merged = Clusters(
        members=tuple(tuple(nodes) for nodes in members),
        compute_s=total(clusters.compute_s),
        host_compute_s=total(clusters.host_compute_s),
        memory_bytes=total(clusters.memory_bytes),
        on_accelerator=total(~clusters.on_accelerator) == 0,
        nets=tuple(costs),
        net_cost_s=np.array(list(costs.values()), dtype=np.float64),
        before=tuple(sorted((first, last) for first, last in pairs if first != last)),
    )
    return merged, parent


class Groups:
    """Disjoint sets of nodes."""

    def __init__(self, num_nodes: int) -> None:
        self._parent = list(range(num_nodes))

    def find(self, node: int) -> int:
        while self._parent[node] != node:
            self._parent[node] = self._parent[self._parent[node]]
            node = self._parent[node]
        return node

    def join(self, one: int, other: int) -> None:
        self._parent[self.find(one)] = self.find(other)

    def join_all(self, nodes: Sequence[int]) -> None:
        for node in nodes[1:]:
            self.join(nodes[0], node)


def _order(graph: PlacementGraph, groups: Groups) -> set[tuple[int, int]]:
    """Pairs (earlier, later) of groups: forward edges, and backward edges turned round where a group has no forward node."""
    has_forward = {groups.find(node) for node in range(graph.num_nodes) if not graph.is_backward[node]}
    pairs = set()
    for tail, head, _ in graph.edges:
        first, last = groups.find(tail), groups.find(head)
        if first == last:
            continue
        if not graph.is_backward[tail] and not graph.is_backward[head]:
            pairs.add((first, last))
        elif graph.is_backward[tail] and graph.is_backward[head] and not {first, last} <= has_forward:
            pairs.add((last, first))
    return pairs


def _contract(graph: PlacementGraph, groups: Groups, *, is_ordered: bool) -> Clusters:
    members: dict[int, list[int]] = defaultdict(list)
    for node in range(graph.num_nodes):
        members[groups.find(node)].append(node)
    number = {root: index for index, root in enumerate(members)}
    costs: dict[tuple[int, ...], float] = defaultdict(float)
    for tensor in graph.tensors:
        net = tuple(sorted({number[groups.find(node)] for node in (tensor.producer, *tensor.consumers)}))
        if len(net) > 1 and tensor.transfer_s > 0:
            costs[net] += tensor.transfer_s
    order = _order(graph, groups) if is_ordered else ()

    def total(values: Sequence[float]) -> Floats:
        return np.array([sum(values[node] for node in nodes) for nodes in members.values()], dtype=np.float64)

    return Clusters(
        members=tuple(tuple(nodes) for nodes in members.values()),
        compute_s=total(graph.compute_s),
        host_compute_s=total(graph.host_compute_s),
        memory_bytes=total(graph.memory_bytes),
        on_accelerator=np.array(
            [all(graph.on_accelerator[node] for node in nodes) for nodes in members.values()]
        ),
        nets=tuple(costs),
        net_cost_s=np.array(list(costs.values()), dtype=np.float64),
        before=tuple(sorted((number[first], number[last]) for first, last in order)),
    )


def _costless_leaves(clusters: Clusters, *, is_memory_tight: bool, is_ordered: bool) -> list[tuple[int, int]]:
    """Pairs (leaf, onto): moving the leaf to where ``onto`` is never costs anything, wherever that is.

    True of a cluster without compute all of whose nets touch ``onto``: no net gains a device. Contiguity survives if ``onto`` is the only
    cluster that must come after the leaf (the leaf waits for it), or the only one that must come before it (the leaf goes along with it).
    """
    nets_of: list[list[int]] = [[] for _ in range(len(clusters))]
    for index, net in enumerate(clusters.nets):
        for one in net:
            nets_of[one].append(index)
    earlier: list[set[int]] = [set() for _ in range(len(clusters))]
    later: list[set[int]] = [set() for _ in range(len(clusters))]
    for first, last in clusters.before:
        later[first].add(last)
        earlier[last].add(first)
    pairs = []
    taken: set[int] = set()
    for leaf in range(len(clusters)):
        is_costless = (
            clusters.compute_s[leaf] == 0
            and clusters.host_compute_s[leaf] == 0
            and clusters.on_accelerator[leaf]
        )
        if leaf in taken or not is_costless or (is_memory_tight and clusters.memory_bytes[leaf] > 0):
            continue
        onto = _shared(clusters, nets_of[leaf]) - {leaf} - taken
        if is_ordered:
            onto &= {one for side in (earlier[leaf], later[leaf]) if len(side) == 1 for one in side}
        if onto:
            target = min(onto)
            pairs.append((leaf, target))
            taken |= {leaf, target}
    return pairs


def _shared(clusters: Clusters, nets: Iterable[int]) -> set[int]:
    """The clusters on every one of ``nets``; all clusters where there is no net."""
    shared = set(range(len(clusters)))
    for index in nets:
        shared &= set(clusters.nets[index])
    return shared


def _strong_components(num_nodes: int, pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """The strongly connected components of more than one node (Kosaraju, two passes, no recursion)."""
    after: dict[int, list[int]] = defaultdict(list)
    back: dict[int, list[int]] = defaultdict(list)
    for first, last in pairs:
        after[first].append(last)
        back[last].append(first)
    finished: list[int] = []
    seen: set[int] = set()
    for root in range(num_nodes):
        _walk(root, after, seen, finished)
    components = []
    seen.clear()
    for root in reversed(finished):
        component: list[int] = []
        _walk(root, back, seen, component)
        if len(component) > 1:
            components.append(component)
    return components


def _walk(root: int, after: dict[int, list[int]], seen: set[int], finished: list[int]) -> None:
    """Appends to ``finished`` what is reached from ``root`` and not ``seen``, each after its successors."""
    if root in seen:
        return
    seen.add(root)
    path = [(root, iter(after.get(root, ())))]
    while path:
        node, rest = path[-1]
        step = next((one for one in rest if one not in seen), None)
        if step is None:
            finished.append(node)
            path.pop()
        else:
            seen.add(step)
            path.append((step, iter(after.get(step, ()))))
