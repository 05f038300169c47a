"""The fastest placement found when a device may run any set of nodes: many starts, one refinement, best of all."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from shardstage.errors import PlanError
from shardstage.planner.placement.clusters import Clusters, cluster
from shardstage.planner.placement.contiguous import place_contiguous
from shardstage.planner.placement.graph import Placement, PlacementGraph, stage_time_s
from shardstage.planner.placement.limits import Limits, lower_bound_s
from shardstage.planner.placement.multilevel import v_cycle
from shardstage.planner.placement.refine import Standing, standing

__all__ = ["place"]

Ints = npt.NDArray[np.int64]


def place(
    graph: PlacementGraph,
    num_devices: int,
    *,
    memory_limit_bytes: float = math.inf,
    num_hosts: int = 0,
    max_moves: int = 30_000,
    time_limit_s: float = 4.0,
    seed: int = 0,
    starts: Mapping[str, Sequence[int]] | None = None,
) -> Placement:
    """The fastest placement found, contiguous or not; never slower than ``place_contiguous`` or any of ``starts`` (name → device of each node).

    Deterministic by ``seed`` as long as ``max_moves`` ends the search; ``time_limit_s`` ends it earlier on a slow machine.
    Raises PlanError where no placement within the memory limit is found.
    """
    deadline_s = time.perf_counter() + time_limit_s
    limits = Limits(num_devices=num_devices, num_hosts=num_hosts, memory_limit_bytes=memory_limit_bytes)
    clusters = cluster(graph, is_memory_tight=limits.is_memory_tight(graph), is_ordered=False)
    search = _Search(
        clusters=clusters,
        limits=limits,
        deadline_s=deadline_s,
        moves_left=max_moves,
        rng=np.random.default_rng(seed),
    )
    for name, device_of in _starts(graph, clusters, limits, starts or {}, seed):
        search.improve(name, device_of)
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
    method = f"multilevel tabu refinement from {search.best_name}, best of {len(search.results)} starts"
    return Placement(device_of=device_of, stage_time_s=time_s, lower_bound_s=bound_s, method=method)


class _Search:
    """Refines starts, then keeps perturbing and refining the best of them until the moves or the time are spent."""

    def __init__(
        self,
        *,
        clusters: Clusters,
        limits: Limits,
        deadline_s: float,
        moves_left: int,
        rng: np.random.Generator,
    ) -> None:
        self.clusters, self.limits, self.deadline_s, self.moves_left, self.rng = (
            clusters,
            limits,
            deadline_s,
            moves_left,
            rng,
        )
        self.results: list[tuple[str, Standing]] = []
        self.moves_per_cycle = max(200, moves_left // 25)

    @property
    def best_index(self) -> int:
        return min(
            range(len(self.results)),
            key=lambda i: (self.results[i][1].excess_bytes, self.results[i][1].stage_time_s),
        )

    @property
    def best(self) -> Standing:
        return self.results[self.best_index][1]

    @property
    def best_name(self) -> str:
        return self.results[self.best_index][0]

    def has_budget(self) -> bool:
        return self.moves_left > 0 and time.perf_counter() < self.deadline_s

    def improve(self, name: str, device_of: Ints) -> None:
        """Adds a start, refined if there is still budget."""
        found = standing(self.clusters, self.limits, device_of)
        self.results.append((name, self._cycle(found) if self.has_budget() else found))

    def iterate(self) -> None:
        """Cycles from the three best results in turn, every other time from a shaken copy."""
        turn = 0
        while self.has_budget() and len(self.clusters) > 1:
            ranked = sorted(
                range(len(self.results)),
                key=lambda i: (self.results[i][1].excess_bytes, self.results[i][1].stage_time_s),
            )
            index = ranked[(turn // 2) % min(3, len(ranked))]
            name, known = self.results[index]
            found = self._cycle(known if turn % 2 == 0 else self._shaken(known))
            if found.is_better_than(known):
                self.results[index] = (name, found)
            turn += 1

    def _cycle(self, start: Standing) -> Standing:
        coarsest = int(self.rng.choice([10, 20, 40])) * (self.limits.num_devices + self.limits.num_hosts)
        most = min(self.moves_per_cycle, self.moves_left)
        found, made = v_cycle(
            self.clusters, self.limits, start.device_of, max_moves=most, coarsest=coarsest, rng=self.rng
        )
        self.moves_left -= max(made, 1)
        return found if found.is_better_than(start) else start

    def _shaken(self, known: Standing) -> Standing:
        """A copy in which a random few clusters, and the neighbours of one of them, are elsewhere."""
        device_of = known.device_of.copy()
        num_devices = self.limits.num_devices + self.limits.num_hosts
        allowed = np.flatnonzero(self.clusters.on_accelerator)
        if not len(allowed):
            return known
        centre = int(self.rng.choice(allowed))
        near = {one for net in self.clusters.nets if centre in net for one in net} | {
            int(one) for one in self.rng.choice(allowed, size=4)
        }
        target = int(self.rng.integers(num_devices))
        for one in near:
            if self.clusters.on_accelerator[one]:
                device_of[one] = target
        return standing(self.clusters, self.limits, device_of)


def _starts(
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
    for index in range(3):
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
    starts, neighbours, edge_weights = [0], [], []
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
