"""The fastest placement found when a device may run any set of nodes: many starts, one refinement, best of all."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from shardstage.errors import PlanError
from shardstage.planner.placement.clusters import Clusters, Ints
from shardstage.planner.placement.graph import Placement, PlacementGraph, stage_time_s
from shardstage.planner.placement.limits import Limits
from shardstage.planner.placement.multilevel import v_cycle
from shardstage.planner.placement.refine import Standing, refine, standing
from shardstage.planner.placement.starts import first_placements
from shardstage.planner.placement.weld import lower_bound_s, weld

__all__ = ["place"]

_PROPOSALS_PER_CYCLE = 10_000  # 30 ms: many short cycles from different starts found more than few long ones


def place(
    graph: PlacementGraph,
    num_devices: int,
    *,
    memory_limit_bytes: float = math.inf,
    num_hosts: int = 0,
    max_moves: int = 2_000_000,
    time_limit_s: float = 4.3,
    seed: int = 0,
    starts: Mapping[str, Sequence[int]] | None = None,
) -> Placement:
    """The fastest placement found, contiguous or not; never slower than ``place_contiguous`` (up to 6,000 ideals) or any of ``starts``.

    ``starts``: the device of each node, by name.

    Deterministic by ``seed`` as long as ``max_moves`` ends the search; ``time_limit_s`` seconds of this thread's
    CPU end it earlier on a slow machine.
    Raises PlanError where no placement within the memory limit is found.
    """
    deadline_s = time.thread_time() + time_limit_s
    limits = Limits(num_devices=num_devices, num_hosts=num_hosts, memory_limit_bytes=memory_limit_bytes)
    clusters = limits.clusters(graph, is_ordered=False)
    search = _Search(
        clusters=clusters,
        limits=limits,
        deadline_s=deadline_s,
        moves_left=max_moves,
        rng=np.random.default_rng(seed),
    )
    for name, start in first_placements(graph, clusters, limits, starts or {}, seed):
        search.improve(name, start)
    search.iterate()
    best = search.best
    if best.excess_bytes > 0:
        raise PlanError(
            f"no placement found on {num_devices} devices of {memory_limit_bytes:.4g} bytes: {best.excess_bytes:.4g} bytes too many",
            hint=f"num_devices = {num_devices + 1}",
        )
    device_of = clusters.spread([int(one) for one in best.device_of], graph.num_nodes)
    time_s = stage_time_s(graph, device_of, num_devices=num_devices, num_hosts=num_hosts)
    bound_s = min(time_s, lower_bound_s(clusters, limits, below_s=time_s))
    method = f"multilevel annealing from {search.best_name}, best of {len(search.results)} starts"
    return Placement(device_of=device_of, stage_time_s=time_s, lower_bound_s=bound_s, method=method)


class _Search:
    """Refines starts, adds many grown from nothing, and combines and shakes the best, until the proposals or the time are spent."""

    def __init__(
        self,
        *,
        clusters: Clusters,
        limits: Limits,
        deadline_s: float,
        moves_left: int,
        rng: np.random.Generator,
    ) -> None:
        self.clusters, self.limits, self.deadline_s = clusters, limits, deadline_s
        self.moves_left, self.rng = moves_left, rng
        self.began_s, self.all_moves = time.thread_time(), moves_left
        self.results: list[tuple[str, Standing]] = []
        self.welded: tuple[Clusters, Ints] | None = (clusters, np.arange(len(clusters)))
        self.welded_below_s = math.inf

    @property
    def best_index(self) -> int:
        return min(range(len(self.results)), key=lambda index: self.results[index][1].rank)

    @property
    def best(self) -> Standing:
        return self.results[self.best_index][1]

    @property
    def best_name(self) -> str:
        return self.results[self.best_index][0]

    def has_budget(self) -> bool:
        return self.moves_left > 0 and time.thread_time() < self.deadline_s

    def spent_ratio(self) -> float:
        """How much of the proposals or of the time is gone, whichever is more."""
        time_ratio = (time.thread_time() - self.began_s) / max(self.deadline_s - self.began_s, 1e-9)
        return max(1 - self.moves_left / self.all_moves, time_ratio)

    def improve(self, name: str, device_of: Ints) -> None:
        """Adds a start, refined if there is still budget."""
        found = standing(self.clusters, self.limits, device_of)
        if self.has_budget():
            polished, moves = refine(
                self.clusters, self.limits, device_of, max_moves=300, patience=60, rng=self.rng
            )
            self.moves_left -= moves
            found = polished if polished.is_better_than(found) else found
        self.results.append((name, found))

    def iterate(self) -> None:
        """Starts from nothing for the first two fifths, then cycles; ends early where the best is proved optimal."""
        while self.has_budget() and self._weld():
            if self.spent_ratio() < 0.4 or self.rng.random() < 0.3:
                self.results.append(("growth", self._cycle(None, None)))
                continue
            ranked = sorted(range(len(self.results)), key=lambda index: self.results[index][1].rank)
            index, other = (
                ranked[int(self.rng.integers(min(4, len(ranked))))],
                int(self.rng.choice(ranked[:8])),
            )
            name, known = self.results[index]
            if other == index:
                found = self._cycle(self._shaken(known), None)
            else:
                found = self._cycle(known, self.results[other][1])
            if found.is_better_than(known):
                self.results[index] = (name, found)

    def _weld(self) -> bool:
        """Joins what every placement faster than the best keeps together; False where there is none."""
        best = self.best
        if best.excess_bytes == 0 and best.stage_time_s < self.welded_below_s:
            self.welded_below_s = best.stage_time_s
            self.welded = weld(self.clusters, self.limits, below_s=best.stage_time_s)
        return self.welded is not None and len(self.welded[0]) > 1

    def _cycle(self, start: Standing | None, apart: Standing | None) -> Standing:
        """The better of ``start`` and what a V-cycle makes of it, or of nothing."""
        graph, parent = self.welded or (self.clusters, np.arange(len(self.clusters)))
        first_of = np.unique(parent, return_index=True)[1]
        proposals = max(1, min(_PROPOSALS_PER_CYCLE, 100 * len(graph), self.moves_left))
        found = v_cycle(
            graph,
            self.limits,
            None if start is None else start.device_of[first_of],
            keep_apart=None if apart is None else apart.device_of[first_of],
            proposals=proposals,
            coarsest=int(self.rng.choice([6, 9, 15])) * (self.limits.num_devices + self.limits.num_hosts),
            rng=self.rng,
        )
        self.moves_left -= proposals
        found = replace(found, device_of=found.device_of[parent])
        return found if start is None or found.is_better_than(start) else start

    def _shaken(self, known: Standing) -> Standing:
        """A copy in which two clusters have changed places, or with them a few and the neighbours of one are elsewhere."""
        device_of = known.device_of.copy()
        num_devices = self.limits.num_devices + self.limits.num_hosts
        allowed = np.flatnonzero(self.clusters.on_accelerator)
        if not len(allowed):
            return known
        one, other = (int(index) for index in self.rng.choice(allowed, size=2))
        device_of[one], device_of[other] = device_of[other], device_of[one]
        if self.rng.random() < 0.5:
            return standing(self.clusters, self.limits, device_of)
        centre = int(self.rng.choice(allowed))
        near = {one for net in self.clusters.nets if centre in net for one in net} | {
            int(one) for one in self.rng.choice(allowed, size=4)
        }
        target = int(self.rng.integers(num_devices))
        for one in near:
            if self.clusters.on_accelerator[one]:
                device_of[one] = target
        return standing(self.clusters, self.limits, device_of)
