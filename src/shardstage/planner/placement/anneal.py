"""Simulated annealing on the true objective, in plain Python: a proposal looks only at the nets of one cluster.

A proposal takes a cluster of a cut net to the device of another cluster of that net. Its worth is the change of Σ over devices of
(load / scale) ** power; a worse one is taken with probability exp(-change / temperature), and the temperature falls by a constant ratio.
"""

from __future__ import annotations

import math
import random

import numpy as np

from shardstage.planner.placement.clusters import Clusters, Ints
from shardstage.planner.placement.limits import Limits
from shardstage.planner.placement.refine import Standing, refine, standing

__all__ = ["anneal"]

_COLD = (
    1e-4  # of the objective, which is about 1 for the largest load: with power 16, a step of 6e-6 of the time
)
_PROPOSALS_PER_STEP = 256


def anneal(
    clusters: Clusters,
    limits: Limits,
    start: Ints,
    *,
    proposals: int,
    hot: float,
    power: int,
    rng: np.random.Generator,
) -> Standing:
    """The best placement met from ``start`` in ``proposals`` proposals; ``start`` itself if there is none better."""
    known = standing(clusters, limits, start)
    if known.excess_bytes > 0:  # memory first, by the tabu search
        known = refine(clusters, limits, start, max_moves=200, patience=100, rng=rng)[0]
    if known.excess_bytes > 0 or not clusters.nets:
        return known
    walk = _Walk(
        clusters, limits, start, power=power, best_s=known.stage_time_s, seed=int(rng.integers(2**62))
    )
    steps = max(1, proposals // _PROPOSALS_PER_STEP)
    temperature = hot
    cooling = (_COLD / hot) ** (1 / steps)
    for _ in range(steps):
        walk.step(temperature, _PROPOSALS_PER_STEP)
        temperature *= cooling
    found = standing(clusters, limits, np.array(walk.best_device_of, dtype=np.int64))
    return found if found.is_better_than(known) else known


class _Walk:
    """A placement in plain lists, and the best that it has been."""

    def __init__(
        self, clusters: Clusters, limits: Limits, start: Ints, *, power: int, best_s: float, seed: int
    ) -> None:
        self.random = random.Random(seed)
        self.power, self.best_s = power, best_s
        self.scale_s = best_s or 1.0
        num_devices = limits.num_devices + limits.num_hosts
        self.device_of: list[int] = start.tolist()
        self.best_device_of = list(self.device_of)
        self.pays = [device < limits.num_devices for device in range(num_devices)]
        self.nets = [list(net) for net in clusters.nets]
        self.net_cost_s: list[float] = clusters.net_cost_s.tolist()
        self.nets_of: list[list[int]] = [[] for _ in range(len(clusters))]
        for index, net in enumerate(self.nets):
            for one in net:
                self.nets_of[one].append(index)
        self.movable = [
            one for one in range(len(clusters)) if self.nets_of[one] or clusters.compute_s[one] > 0
        ]
        self.on_accelerator: list[bool] = clusters.on_accelerator.tolist()
        self.device_s: list[float] = clusters.compute_s.tolist()
        self.host_s: list[float] = clusters.host_compute_s.tolist()
        self.bytes: list[float] = clusters.memory_bytes.tolist()
        self.room_bytes = [limits.memory_limit_bytes if pays else math.inf for pays in self.pays]
        self.held = [[0] * num_devices for _ in self.nets]
        for index, net in enumerate(self.nets):
            for one in net:
                self.held[index][self.device_of[one]] += 1
        for one, device in enumerate(self.device_of):
            self.room_bytes[device] -= self.bytes[one]
        self.cut_nets: list[int] = []
        self.place_of = [-1] * len(self.nets)  # of a net in cut_nets
        for index, net in enumerate(self.nets):
            self._note_cut(index, max(self.held[index]) < len(net))
        self.loads_s = self._loads()

    def _loads(self) -> list[float]:
        loads = [0.0] * len(self.pays)
        for one, device in enumerate(self.device_of):
            loads[device] += self.device_s[one] if self.pays[device] else self.host_s[one]
        for net, cost_s, held in zip(self.nets, self.net_cost_s, self.held, strict=True):
            for device, count in enumerate(held):
                if 0 < count < len(net) and self.pays[device]:
                    loads[device] += cost_s
        return loads

    def step(self, temperature: float, proposals: int) -> None:
        """Makes ``proposals`` proposals at one temperature."""
        chance = self.random.random
        num_devices, power, scale_s = len(self.pays), self.power, self.scale_s
        loads_s, cut_nets, movable = self.loads_s, self.cut_nets, self.movable
        for _ in range(proposals):
            if cut_nets and chance() < 0.95:
                net = self.nets[cut_nets[int(chance() * len(cut_nets))]]
                one = net[int(chance() * len(net))]
                target = self.device_of[net[int(chance() * len(net))]]
            else:
                one, target = movable[int(chance() * len(movable))], int(chance() * num_devices)
            source = self.device_of[one]
            if target == source:
                continue
            left_s, joined_s = self._loads_after(one, source, target)
            change = (
                (left_s / scale_s) ** power
                + (joined_s / scale_s) ** power
                - (loads_s[source] / scale_s) ** power
                - (loads_s[target] / scale_s) ** power
            )
            if (change <= 0 or chance() < math.exp(-change / temperature)) and self._may_go(one, target):
                self._move(one, source, target, left_s, joined_s)

    def _loads_after(self, one: int, source: int, target: int) -> tuple[float, float]:
        """Loads of ``source`` and ``target`` were ``one`` to move."""
        left_s = joined_s = 0.0
        for index in self.nets_of[one]:
            held, size = self.held[index], len(self.nets[index])
            if held[source] == size:
                left_s += self.net_cost_s[index]
                joined_s += self.net_cost_s[index]
                continue
            if held[source] == 1:
                left_s -= self.net_cost_s[index]
            if not held[target]:
                joined_s += self.net_cost_s[index]
            elif held[target] == size - 1:
                joined_s -= self.net_cost_s[index]
        left_s = left_s - self.device_s[one] if self.pays[source] else -self.host_s[one]
        joined_s = joined_s + self.device_s[one] if self.pays[target] else self.host_s[one]
        return max(self.loads_s[source] + left_s, 0.0), self.loads_s[target] + joined_s

    def _may_go(self, one: int, target: int) -> bool:
        return self.bytes[one] <= self.room_bytes[target] and (
            self.on_accelerator[one] or not self.pays[target]
        )

    def _move(self, one: int, source: int, target: int, left_s: float, joined_s: float) -> None:
        for index in self.nets_of[one]:
            held = self.held[index]
            held[source] -= 1
            held[target] += 1
            self._note_cut(index, len(self.nets[index]) > held[target])
        self.device_of[one] = target
        self.room_bytes[source] += self.bytes[one]
        self.room_bytes[target] -= self.bytes[one]
        self.loads_s[source], self.loads_s[target] = left_s, joined_s
        time_s = max(self.loads_s)
        if time_s < self.best_s * (1 - 1e-9):
            self.best_s = time_s
            self.best_device_of = list(self.device_of)

    def _note_cut(self, index: int, is_cut: bool) -> None:
        """Keeps ``cut_nets`` a list of the nets on more than one device, in no order."""
        place = self.place_of[index]
        if is_cut and place < 0:
            self.place_of[index] = len(self.cut_nets)
            self.cut_nets.append(index)
        elif not is_cut and place >= 0:
            last = self.cut_nets.pop()
            if last != index:
                self.cut_nets[place] = last
                self.place_of[last] = place
            self.place_of[index] = -1
