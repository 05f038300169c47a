"""Moves of one cluster at a time on the true objective, with a tabu list: Fiduccia–Mattheyses that may go on downhill and up.

For every cluster v and device d two sums over the nets t of v say what a move changes, and only on the two devices it touches:

    leave(v, d) = Σ_t  +cost(t) if all of t is on d,  -cost(t) if v is the only one of t on d,        else 0
    join(v, d)  = Σ_t  +cost(t) if none of t is on d, -cost(t) if v is the only one of t not on d,    else 0

The objective of a move is Σ over devices of (load / scale) ** power: a smooth stand-in for (largest load, then the next ones), which sees
progress on plateaus of the maximum. What is kept is the placement of least maximum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shardstage.planner.placement.clusters import Clusters, Floats, Ints
from shardstage.planner.placement.limits import Limits

__all__ = ["FINAL_POWER", "Standing", "refine", "standing"]

FINAL_POWER = 16  # on 6 devices the root of the sum of powers is within 12 % of the maximum, and still sees the second largest load


@dataclass(frozen=True, kw_only=True)
class Standing:
    """A placement of clusters and how good it is: what exceeds the memory limit counts before the time."""

    device_of: Ints  # [n]
    excess_bytes: float
    stage_time_s: float

    @property
    def rank(self) -> tuple[float, float]:
        """Smaller is better."""
        return self.excess_bytes, self.stage_time_s

    def is_better_than(self, other: Standing) -> bool:
        return (self.excess_bytes, self.stage_time_s) < (other.excess_bytes, other.stage_time_s * (1 - 1e-12))


def standing(clusters: Clusters, limits: Limits, device_of: Ints) -> Standing:
    """The worth of a placement, computed from nothing."""
    num_devices = limits.num_devices + limits.num_hosts
    pays = np.arange(num_devices) < limits.num_devices
    here = np.eye(num_devices)[device_of]
    held = clusters.incidence.T @ here
    touches = (held > 0) & (held < clusters.net_sizes[:, None])
    compute_s = np.where(pays, clusters.compute_s @ here, clusters.host_compute_s @ here)
    loads_s = compute_s + pays * (clusters.net_cost_s @ touches)
    excess_bytes = np.maximum(clusters.memory_bytes @ here - limits.memory_limit_bytes * (1 + 1e-12), 0)[
        pays
    ].sum()
    return Standing(
        device_of=device_of.copy(), excess_bytes=float(excess_bytes), stage_time_s=float(loads_s.max())
    )


def refine(
    clusters: Clusters,
    limits: Limits,
    start: Ints,
    *,
    max_moves: int,
    patience: int,
    power: int = FINAL_POWER,
    rng: np.random.Generator,
) -> tuple[Standing, int]:
    """The best placement met from ``start`` and the moves made: at most ``max_moves``, and at most ``patience`` without a better one."""
    state = _State(clusters, limits, start)
    best = Standing(
        device_of=start.copy(), excess_bytes=state.excess_bytes(), stage_time_s=float(state.loads_s.max())
    )
    tabu_until = np.zeros(state.joins_s.shape, dtype=np.int64)
    last_better = move = 0
    tenure = max(2, len(clusters) // 20)
    while move < max_moves and move - last_better < patience:
        chosen = state.best_move(tabu_until > move, best, power)
        if chosen is None:
            break
        one, target = chosen
        tabu_until[one, state.device_of[one]] = move + tenure + int(rng.integers(tenure + 1))
        state.move(one, target)
        move += 1
        time_s, excess = float(state.loads_s.max()), state.excess_bytes()
        if (excess, time_s) < (best.excess_bytes, best.stage_time_s * (1 - 1e-12)):
            best = Standing(device_of=state.device_of.copy(), excess_bytes=excess, stage_time_s=time_s)
            last_better = move
    return best, move


class _State:
    """A placement with its loads and the change that every move would make."""

    def __init__(self, clusters: Clusters, limits: Limits, device_of: Ints) -> None:
        num_devices = limits.num_devices + limits.num_hosts
        self.pays = np.arange(num_devices) < limits.num_devices  # accelerators pay for communication
        self.device_of = device_of.copy()
        self.nets_of = [np.flatnonzero(row) for row in clusters.incidence]
        self.on_net = np.ascontiguousarray(clusters.incidence.T)  # [nets, n]
        self.net_cost_s, self.net_sizes = clusters.net_cost_s, clusters.net_sizes
        self.compute_s = np.where(
            self.pays, clusters.compute_s[:, None], clusters.host_compute_s[:, None]
        )  # [n, devices]
        self.memory_bytes = clusters.memory_bytes
        self.limit_bytes = np.where(self.pays, limits.memory_limit_bytes, np.inf)
        self.is_barred = self.pays & ~clusters.on_accelerator[:, None]
        self.is_memory_tight = bool(clusters.memory_bytes.sum() > limits.memory_limit_bytes)
        here = np.eye(num_devices)[self.device_of]  # [n, devices]
        self.held_bytes = here.T @ self.memory_bytes
        self.held = self.on_net @ here  # [nets, devices]
        touches = (self.held > 0) & (self.held < self.net_sizes[:, None])
        self.loads_s = (here * self.compute_s).sum(axis=0) + self.pays * (self.net_cost_s @ touches)
        self.leaves_s = clusters.incidence @ self._leave(self.held, slice(None))
        self.joins_s = clusters.incidence @ self._join(self.held, slice(None))

    def _leave(self, held: Floats, nets: Ints | slice) -> Floats:
        sizes, cost_s = self.net_sizes[nets, None], self.net_cost_s[nets, None]
        change: Floats = cost_s * ((held == sizes).astype(np.float64) - (held == 1))
        return change

    def _join(self, held: Floats, nets: Ints | slice) -> Floats:
        sizes, cost_s = self.net_sizes[nets, None], self.net_cost_s[nets, None]
        change: Floats = cost_s * ((held == 0).astype(np.float64) - (held == sizes - 1))
        return change

    def excess_bytes(self) -> float:
        return (
            float(np.maximum(self.held_bytes - self.limit_bytes * (1 + 1e-12), 0).sum())
            if self.is_memory_tight
            else 0.0
        )

    def best_move(self, is_tabu: npt.NDArray[np.bool_], best: Standing, power: int) -> tuple[int, int] | None:
        """The move (cluster, device) of least objective that is not tabu, or that beats ``best``; None where there is none."""
        everyone = np.arange(len(self.device_of))
        scale_s = self.loads_s.max() or 1.0
        source = self.device_of
        left_s = (
            self.loads_s[source]
            - self.compute_s[everyone, source]
            + self.pays[source] * self.leaves_s[everyone, source]
        )
        joined_s = self.loads_s + self.compute_s + self.pays * self.joins_s
        now = _powered(self.loads_s / scale_s, power)
        change = _powered(joined_s / scale_s, power) - now
        change += (_powered(left_s / scale_s, power) - now[source])[:, None]
        change[everyone, source] = np.inf
        change[self.is_barred] = np.inf
        if self.is_memory_tight:
            self._weigh_memory(change)
        freest = int(np.argmin(change))
        if is_tabu.flat[freest]:
            one, target = divmod(freest, change.shape[1])
            others = np.delete(self.loads_s, [source[one], target])
            reached_s = max(left_s[one], joined_s[one, target], others.max(initial=0.0))
            if self.is_memory_tight or reached_s >= best.stage_time_s * (1 - 1e-12):
                change[is_tabu] = np.inf
                freest = int(np.argmin(change))
        if not np.isfinite(change.flat[freest]):
            return None
        one, target = divmod(freest, change.shape[1])
        return one, target

    def _weigh_memory(self, change: Floats) -> None:
        """Bars moves to where there is no room; rewards moves out of a device that holds too much."""
        no_room = self.held_bytes + self.memory_bytes[:, None] > self.limit_bytes
        change[no_room & (self.memory_bytes[:, None] > 0)] = np.inf
        is_over = (self.held_bytes > self.limit_bytes * (1 + 1e-12))[self.device_of]
        change -= 1e3 * (is_over * self.memory_bytes / (self.memory_bytes.max() or 1.0))[:, None]

    def move(self, one: int, target: int) -> None:
        """Puts cluster ``one`` on device ``target`` and brings every sum up to date; only the nets of ``one`` change, on two devices."""
        source = int(self.device_of[one])
        nets = self.nets_of[one]
        self.loads_s[source] += self.pays[source] * self.leaves_s[one, source] - self.compute_s[one, source]
        self.loads_s[target] += self.pays[target] * self.joins_s[one, target] + self.compute_s[one, target]
        pair = np.array([source, target])
        before = self.held[np.ix_(nets, pair)]
        after = before + np.array([-1.0, 1.0])
        self.held[np.ix_(nets, pair)] = after
        on_nets = self.on_net[nets].T  # [n, nets of one]
        self.leaves_s[:, pair] += on_nets @ (self._leave(after, nets) - self._leave(before, nets))
        self.joins_s[:, pair] += on_nets @ (self._join(after, nets) - self._join(before, nets))
        self.held_bytes[source] -= self.memory_bytes[one]
        self.held_bytes[target] += self.memory_bytes[one]
        self.device_of[one] = target


def _powered(loads: Floats, power: int) -> Floats:
    """``loads ** power`` for a power of two, by squaring."""
    while power > 1:
        loads, power = loads * loads, power // 2
    return loads
