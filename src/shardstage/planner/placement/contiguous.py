"""The fastest contiguous placement: dynamic programming over ideals, device by device.

    best(a, h, I) = least stage time of the clusters in ideal I on a accelerators and h hosts
                  = min over ideals J ⊂ I and the kind of the last device of  max(best(before, J), load(I \\ J))

    load(I \\ J)  = compute(I) - compute(J) + cut(I) + Σ over nets t cut by J of  cost(t) · ([I holds more of t than J] - [I cuts t])

where ``cut(I)`` is the cost of the nets that I touches and does not hold whole. The sum runs over the few nets
that J cuts, for all I at once. What cannot beat the incumbent is left out: a load of at least the incumbent, an ideal whose rest is too
much for the devices left, a row that a device fewer equals. What shares a device in every faster placement is welded first (weld.py).
Source: Tarnawski et al., NeurIPS 2020, §5.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shardstage.errors import PlanError
from shardstage.planner.placement.clusters import Clusters, Floats, Ints
from shardstage.planner.placement.graph import Placement, PlacementGraph, stage_time_s
from shardstage.planner.placement.ideals import all_ideals, given_order, linear_orders, prefixes
from shardstage.planner.placement.limits import Limits
from shardstage.planner.placement.weld import lower_bound_s, weld

__all__ = ["place_contiguous", "place_in_order"]


def place_contiguous(
    graph: PlacementGraph,
    num_devices: int,
    *,
    memory_limit_bytes: float = math.inf,
    num_hosts: int = 0,
    max_ideals: int = 20_000,
    num_orders: int = 8,
    seed: int = 0,
) -> Placement:
    """The fastest placement in which each device runs a contiguous set, exact up to ``max_ideals`` ideals.

    Beyond, the best whose devices end at prefixes of ``num_orders`` topological orders, mixed freely; ``method`` says which of the two.
    Raises PlanError where the memory limit leaves no contiguous placement among those looked at.
    """
    limits = Limits(num_devices=num_devices, num_hosts=num_hosts, memory_limit_bytes=memory_limit_bytes)
    clusters = limits.clusters(graph, is_ordered=True)
    found = _over_orders(clusters, limits, num_orders=1, seed=seed)
    below_s = found.stage_time_s if found else _more_than_any(clusters)
    rest = weld(clusters, limits, below_s=below_s)
    ideals = [] if rest is None else all_ideals(rest[0], at_most=max_ideals)
    better = None
    if rest is not None and ideals is not None:
        better = _best_over(rest[0], ideals, limits, below_s=below_s)
    elif rest is not None:
        better = _over_orders(rest[0], limits, num_orders=num_orders, seed=seed, below_s=below_s)
    if better is not None and rest is not None:
        found = _Found(stage_time_s=better.stage_time_s, device_of=better.device_of[rest[1]])
    if found is None:
        raise _nothing_fits(graph, limits)
    device_of = clusters.spread(found.device_of.tolist(), graph.num_nodes)
    time_s = stage_time_s(graph, device_of, num_devices=num_devices, num_hosts=num_hosts)
    if ideals is None:
        method = f"linear orders, {num_orders} of them mixed, as there are more than {max_ideals} ideals"
        bound_s = min(time_s, lower_bound_s(clusters, limits, below_s=time_s))
    else:
        method, bound_s = f"exact over {len(ideals)} ideals", time_s
    return Placement(device_of=device_of, stage_time_s=time_s, lower_bound_s=bound_s, method=method)


def place_in_order(
    graph: PlacementGraph, num_devices: int, *, memory_limit_bytes: float = math.inf
) -> Placement:
    """The fastest line of stages: nodes in the order of their numbers, cut into at most ``num_devices`` runs. Exact.

    What is colocated, and what lies between on a path, goes where the first of it stands. Raises PlanError where no line fits the memory.
    """
    limits = Limits(num_devices=num_devices, num_hosts=0, memory_limit_bytes=memory_limit_bytes)
    clusters = limits.clusters(graph, is_ordered=True)
    order = given_order(clusters)
    found = _best_over(clusters, prefixes(order), limits, below_s=_more_than_any(clusters))
    if found is None:
        raise _nothing_fits(graph, limits)
    device_of = clusters.spread(found.device_of.tolist(), graph.num_nodes)
    time_s = stage_time_s(graph, device_of, num_devices=num_devices)
    method = f"exact over the cuts of one order of {len(order)} clusters"
    return Placement(device_of=device_of, stage_time_s=time_s, lower_bound_s=time_s, method=method)


def _nothing_fits(graph: PlacementGraph, limits: Limits) -> PlanError:
    held, room = sum(graph.memory_bytes), limits.memory_limit_bytes
    return PlanError(
        f"no contiguous placement on {limits.num_devices} devices of {room:.4g} bytes holds {held:.4g} bytes",
        hint=f"num_devices = {limits.num_devices + 1}",
    )


@dataclass(frozen=True, kw_only=True)
class _Found:
    stage_time_s: float
    device_of: Ints  # [clusters]


def _more_than_any(clusters: Clusters) -> float:
    """A stage time above that of every placement."""
    return 1.0 + 2 * float(
        clusters.compute_s.sum() + clusters.host_compute_s.sum() + clusters.net_cost_s.sum()
    )


def _over_orders(
    clusters: Clusters, limits: Limits, *, num_orders: int, seed: int, below_s: float = math.inf
) -> _Found | None:
    """The best whose devices end at prefixes of a few linear orders: of each order first, then of all of them mixed."""
    found = None
    below_s = min(below_s, _more_than_any(clusters))
    chains = [prefixes(order) for order in linear_orders(clusters, count=num_orders, seed=seed)]
    mixed = list(dict.fromkeys(ideal for chain in chains for ideal in chain))
    for ideals in (chains[0], mixed)[:num_orders]:
        better = _best_over(clusters, ideals, limits, below_s=below_s)
        if better is not None:
            found, below_s = better, better.stage_time_s
    return found


def _best_over(clusters: Clusters, ideals: list[int], limits: Limits, *, below_s: float) -> _Found | None:
    """The best placement whose devices end at ``ideals``; None where none is faster than ``below_s``."""
    table = _Table(clusters, ideals, limits, below_s)
    for start in range(len(table.order)):
        table.extend(start)
    return table.best()


class _Table:
    """The states of the dynamic programme: one row per (accelerators, hosts) used, one column per ideal, by rising compute."""

    def __init__(self, clusters: Clusters, ideals: list[int], limits: Limits, below_s: float) -> None:
        self.clusters, self.limits, self.below_s = clusters, limits, below_s
        self.is_memory_tight = bool(clusters.memory_bytes.sum() > limits.memory_limit_bytes)
        width = (len(clusters) + 7) // 8
        packed = np.frombuffer(
            b"".join(one.to_bytes(width, "little") for one in ideals), dtype=np.uint8
        ).reshape(len(ideals), width)
        inside = np.unpackbits(packed, axis=1, count=len(clusters), bitorder="little").astype(
            np.float64
        )  # [ideals, clusters]
        sums = (
            inside
            @ np.stack(
                [
                    clusters.compute_s,
                    clusters.host_compute_s,
                    clusters.memory_bytes,
                    ~clusters.on_accelerator,
                    np.ones(len(clusters)),
                ]
            ).T
        )
        self.order = np.lexsort((sums[:, 4], sums[:, 0]))
        self.inside = inside[self.order]
        self.compute_s, self.host_s, self.memory_bytes, self.host_only, _ = np.ascontiguousarray(
            sums[self.order].T
        )
        padded = np.zeros((len(ideals), -(-width // 8) * 8), dtype=np.uint8)
        padded[:, :width] = packed[self.order]
        self.words = np.ascontiguousarray(padded.view(np.uint64).T)  # [words, ideals]
        in_later = np.bitwise_and.accumulate(self.words[:, ::-1], axis=1)[
            :, ::-1
        ]  # bits that all from here on have
        self.in_all_after = np.concatenate([in_later[:, 1:], in_later[:, -1:]], axis=1)
        self.least_later_host_s = np.minimum.accumulate(self.host_s[::-1])[::-1]
        self._count_nets()
        self.rest_s = self.compute_s[-1] - self.compute_s
        if not limits.num_hosts:
            self.rest_s += self.cut_s  # each net cut here is received at least once more
        self.used = [(a, h) for a in range(limits.num_devices + 1) for h in range(limits.num_hosts + 1)]
        self.devices_left = np.array(
            [
                limits.num_devices - a + limits.hosts_in_devices(clusters, limits.num_hosts - h)
                for a, h in self.used
            ]
        )
        self.best_s = np.full((len(self.used), len(ideals)), below_s)
        self.best_s[:, 0] = 0.0
        self.came_from: Ints = np.full((len(self.used), len(ideals)), -1, dtype=np.int64)  # column of J
        self.came_by: Ints = np.full(
            (len(self.used), len(ideals)), -1, dtype=np.int64
        )  # row before the last device

    def _count_nets(self) -> None:
        held = self.clusters.incidence.T.astype(np.float32) @ self.inside.T.astype(
            np.float32
        )  # [nets, ideals]
        is_cut = (held > 0) & (held < self.clusters.net_sizes[:, None])
        self.held = held
        self.is_cut = is_cut.astype(np.float64)
        self.cut_s = self.clusters.net_cost_s @ self.is_cut
        self.cut_nets = [np.flatnonzero(column) for column in np.ascontiguousarray(is_cut.T)]

    def extend(self, start: int) -> None:
        """Puts one more device after ideal ``start``, wherever that may still lead below the incumbent."""
        is_live = (self.best_s[:, start] < self.below_s) & (
            self.rest_s[start] < self.devices_left * self.below_s
        )
        live = [
            (row, *self.used[row])
            for row in np.flatnonzero(is_live).tolist()
            if not self._is_dominated(row, start)
        ]
        steps = [(row, row + self.limits.num_hosts + 1) for row, a, _ in live if a < self.limits.num_devices]
        if steps:
            end = int(np.searchsorted(self.compute_s, self.compute_s[start] + self.below_s))
            self._relax(start, self._device_loads(start, slice(start + 1, end)), steps)
        steps = [(row, row + 1) for row, _, h in live if h < self.limits.num_hosts]
        if steps:
            last = int(np.searchsorted(self.least_later_host_s, self.host_s[start] + self.below_s))
            ends = slice(start + 1, max(last, start + 1))
            loads = np.where(self._holds(start, ends), self.host_s[ends] - self.host_s[start], np.inf)
            self._relax(start, loads, steps)

    def _is_dominated(self, row: int, start: int) -> bool:
        """Whether a device fewer does as well for ideal ``start``."""
        a, h = self.used[row]
        fewer = ([row - self.limits.num_hosts - 1] if a else []) + ([row - 1] if h else [])
        return any(self.best_s[other, start] <= self.best_s[row, start] for other in fewer)

    def _holds(self, start: int, ends: slice) -> npt.NDArray[np.bool_]:
        """Which of the ideals ``ends`` contain ideal ``start``; bits that all later ideals have need no look."""
        is_superset = np.ones(ends.stop - ends.start, dtype=np.bool_)
        missing = self.words[:, start] & ~self.in_all_after[:, start]
        for word in np.flatnonzero(missing):
            is_superset &= (missing[word] & ~self.words[word, ends]) == 0
        return is_superset

    def _device_loads(self, start: int, ends: slice) -> Floats:
        """Load on an accelerator of what each of ``ends`` adds to ideal ``start``; infinite where it cannot run there."""
        nets = self.cut_nets[start]
        cost_s = self.clusters.net_cost_s[nets]
        grows = self.held[nets, ends] > self.held[nets, start][:, None]
        loads: Floats = self.compute_s[ends] - self.compute_s[start] + self.cut_s[ends]
        loads += cost_s @ (grows.astype(np.float64) - self.is_cut[nets, ends])
        fits = self._holds(start, ends)
        if self.is_memory_tight:
            room_bytes = self.limits.memory_limit_bytes * (1 + 1e-12)
            fits &= self.memory_bytes[ends] - self.memory_bytes[start] <= room_bytes
        if self.host_only[-1]:
            fits &= self.host_only[ends] == self.host_only[start]
        loads[~fits] = np.inf
        return loads

    def _relax(self, start: int, loads: Floats, steps: list[tuple[int, int]]) -> None:
        """Enters what is better by way of ``start``; ``loads`` are those of the ideals right after it, in order."""
        for before, after in steps:
            reached = np.maximum(loads, self.best_s[before, start])
            better = np.flatnonzero(reached < self.best_s[after, start + 1 : start + 1 + len(loads)])
            columns = better + start + 1
            self.best_s[after, columns] = reached[better]
            self.came_from[after, columns] = start
            self.came_by[after, columns] = before

    def best(self) -> _Found | None:
        """The full ideal's best row, walked back."""
        column = len(self.order) - 1
        row = int(np.argmin(self.best_s[:, column]))
        if not self.best_s[row, column] < self.below_s:
            return None
        stage_time = float(self.best_s[row, column])
        device_of = np.zeros(len(self.clusters), dtype=np.int64)
        while column:
            before, start = int(self.came_by[row, column]), int(self.came_from[row, column])
            (a, h), (a_before, _) = self.used[row], self.used[before]
            added = (self.inside[column] > 0) & (self.inside[start] == 0)
            device_of[added] = a - 1 if a > a_before else self.limits.num_devices + h - 1
            row, column = before, start
        return _Found(stage_time_s=stage_time, device_of=device_of)
