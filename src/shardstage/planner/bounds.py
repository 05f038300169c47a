"""``bounds_of``: admissible lower bounds of the step time of all choices of a group at once.

A choice's stages are not cut yet: whatever the cut, the slowest of p stages takes at least the mean and at least the heaviest unit, and
so does what waits for ZeRO's gathers (by convexity), the optimizer and the memory of parameters.

    seconds >= m × max(mean stage, heaviest unit) + bubble of mean stages + optimizer of a mean stage + the norm's sum

The bubble's formula asks for means only (``cost.pipeline``). Exposed reductions of gradients count where there is no pipeline, as there a
mean stage is the stage. Arrays are indexed [mesh, schedule, ZeRO].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shardstage.cluster import DeviceClass
from shardstage.cost.compute import moved_s, optimizer_s
from shardstage.cost.links import LinkCosts, overlap_slowdown
from shardstage.cost.memory import MOMENTS
from shardstage.cost.offload import offloaded_update_s
from shardstage.cost.pipeline import LATE_BUBBLES, SPLITTING
from shardstage.cost.profile import RECOMPUTES, Recompute
from shardstage.layout import Mesh
from shardstage.planner.chain import Chain
from shardstage.planner.lattice import Lattice, MeshTable
from shardstage.planner.space import Choice, Group, Schedule, Zero

__all__ = ["Bounds", "bounds_of"]

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Bounds:
    """``seconds`` and ``state_bytes`` are lower bounds; choices that the space does not have are infinite."""

    group: Group
    meshes: tuple[Mesh, ...]
    schedules: tuple[Schedule, ...]
    zeros: tuple[Zero, ...]
    seconds: Array
    state_bytes: Array

    def choice(self, index: int) -> Choice:
        mesh, schedule, zero = np.unravel_index(index, self.seconds.shape)
        return Choice(
            mesh=self.meshes[mesh],
            group=self.group,
            zero=self.zeros[zero],
            schedule=self.schedules[schedule],
        )

    @property
    def num_choices(self) -> int:
        return int(np.isfinite(self.seconds).sum())


def bounds_of(
    lattice: Lattice,
    group: Group,
    chain: Chain,
    costs: LinkCosts,
    settings: BoundSettings,
    compositions: Array,
) -> Bounds | None:
    """Bounds of all choices of a group; None where it has none. ``compositions`` are those of even cuts (``Pricing``)."""
    meshes = lattice.table(group)
    if meshes is None:
        return None
    table = _Table(group, chain, costs, settings, meshes, lattice.zeros, compositions)
    seconds = np.stack([table.seconds(schedule) for schedule in lattice.schedules], axis=1)
    seconds[~meshes.has] = np.inf
    state = np.broadcast_to(table.state_bytes[:, None, :], seconds.shape)
    return Bounds(group, meshes.meshes, lattice.schedules, lattice.zeros, seconds, state)


@dataclass(frozen=True, kw_only=True)
class BoundSettings:
    """What all choices share: bytes of an element computed with, of a gradient's sum and in the optimizer, of a bucket."""

    compute_bytes: int
    master_bytes: int
    gradient_bytes: int
    bucket_bytes: int
    least_factor: float = 1.0
    limit_bytes: int = 0
    modes: tuple[Recompute, ...] = RECOMPUTES
    is_offloaded: bool = False


class _Table:
    """One group's figures as arrays [mesh] or [mesh, ZeRO]."""

    def __init__(
        self,
        group: Group,
        chain: Chain,
        costs: LinkCosts,
        settings: BoundSettings,
        meshes: MeshTable,
        zeros: Sequence[Zero],
        compositions: Array,
    ) -> None:
        self._compositions = compositions
        self._least: dict[Recompute, Array] = {}
        self.settings = settings
        self.chain = chain
        self.pp, self.m = meshes.pp, np.ceil(meshes.share / group.microbatch)
        self._talk = meshes.talk
        self._level = np.array([zero.level for zero in zeros], dtype=np.float64)[None, :]
        self._is_near = np.array([zero.num_ranks is not None for zero in zeros])[None, :]
        self._has_copies = (meshes.talk.replicas > 1)[:, None]
        self._slowdown = overlap_slowdown(costs.cluster.device)
        n, pp = chain.num_units, self.pp[:, None]
        forward, backward = chain.forward_s[n], chain.backward_s[n]
        elements = chain.own[n] + sum(chain.profile.shared_elements.values())
        part = self._part_elements(elements, chain.experts[n], group.ep)
        waits_f, waits_b = self._waits_s(chain.own[n] / pp, forward, backward)
        accumulation = self._accumulation_s(elements / pp, part, costs.cluster.device)
        self.forward = forward / pp + waits_f
        self.backward = backward / pp + waits_b + accumulation
        update = part * self._update_s(costs.cluster.device)
        after = self._after_s(elements / pp, backward + accumulation)
        self.after = after + update + self._talk.norm_s[:, None]
        self.state_bytes = self._state_bytes(elements / pp, part)

    def _part_elements(self, elements: float, experts: float, ep: int) -> Any:
        """What a rank of a mean stage owns under ZeRO."""
        whole, near = self._talk.replicas[:, None], self._talk.near_ranks[:, None]
        shards = np.where(self._level == 0, 1.0, np.where(self._is_near, near, whole))
        expert_shards = np.maximum(1, np.floor(shards / ep))
        return ((elements - experts) / shards + experts / expert_shards) / self.pp[:, None]

    def _waits_s(self, gathered: Any, forward: float, backward: float) -> tuple[Any, Any]:
        """What a mean stage waits for ZeRO-2/3's gathers and reductions for each microbatch, forward and backward."""
        c, g, pp = self.settings.compute_bytes, self.settings.gradient_bytes, self.pp[:, None]
        talk, level = self._talk, self._level
        gather = self._shards_s(talk.gather, talk.near_gather, gathered * c, 1.0)
        scatter = self._scatter_s(gathered * g, 1.0)
        again = np.where(level == 3, gather, 0.0)
        waits_f = self._exposed_s(gather, forward / pp)
        waits_b = self._exposed_s(again + scatter, backward / pp)
        return np.where(level >= 2, waits_f, 0.0), np.where(level >= 2, waits_b, 0.0)

    def _exposed_s(self, talk: Any, compute: Any) -> Any:
        """``links.exposed_s`` where all of the talk can run beside compute: convex, so a mean stage's is at most the stages' mean."""
        return np.maximum(talk - compute, self._slowdown * talk)

    def _update_s(self, device: DeviceClass) -> Any:
        """The optimizer's step for one element: [mesh, ZeRO]."""
        settings = self.settings
        if not settings.is_offloaded:
            return optimizer_s(1, settings.master_bytes, 0, device)
        down, w = settings.gradient_bytes, settings.master_bytes
        as_computed, as_cut = (
            offloaded_update_s(1, device, down_bytes=down, up_bytes=up, element_bytes=w)
            for up in (settings.compute_bytes, down)
        )
        return np.where(self._has_copies & (self._level >= 2), as_cut, as_computed)

    def _accumulation_s(self, own: Any, part: Any, device: DeviceClass) -> Any:
        """Adding a microbatch's gradients to their sums, where there is more than one."""
        added = np.where(self._level >= 2, part, own) * np.where(self.m[:, None] > 1, 1.0, 0.0)
        return added * moved_s(self.settings.compute_bytes + 2.0 * self.settings.gradient_bytes, device)

    def _after_s(self, own: Any, backward: Any) -> Any:
        """After the pipeline: ZeRO-1's new parameters, and without a pipeline the reduction that the last backward does not hide."""
        c, g, level, talk = self.settings.compute_bytes, self.settings.gradient_bytes, self._level, self._talk
        num_buckets = np.maximum(1.0, np.floor(own * c / self.settings.bucket_bytes))
        gathered = self._shards_s(talk.gather, talk.near_gather, own * c, num_buckets)
        reduced = self._has_copies * (num_buckets * talk.reduce[:, :1] + own * g * talk.reduce[:, 1:])
        summed = np.where(level == 0, reduced, self._scatter_s(own * g, num_buckets))
        exposed = np.where(level < 2, self._exposed_s(summed, backward), 0.0)
        return np.where(level == 1, gathered, 0.0) + np.where(self.pp[:, None] == 1, exposed, 0.0)

    def _state_bytes(self, own: Any, part: Any) -> Any:
        """Parameters, gradients, optimizer and one microbatch's least activations of a mean stage."""
        settings, level = self.settings, np.where(self._has_copies, self._level, 0.0)
        c, g, w = settings.compute_bytes, settings.gradient_bytes, settings.master_bytes
        is_cut, stays = level >= 2, 0.0 if settings.is_offloaded else 1.0
        has_own_masters = settings.is_offloaded | (np.where(is_cut, g, c) != w)
        parameters = np.where(level == 3, 0.0, own * c) + np.where(is_cut & has_own_masters, part * g, 0.0)
        gradients = np.where(is_cut, part * g, own * g + np.where(level == 1, part * g, 0.0))
        master = np.where(is_cut | has_own_masters, part * w, 0.0)
        least = min(self.chain.saved[mode][-1] for mode in settings.modes)
        return parameters + gradients + stays * (master + MOMENTS * part * w) + least / self.pp[:, None]

    def _shards_s(self, far: Array, near: Array, num_bytes: Any, calls: Any) -> Any:
        """A collective over the ranks that ZeRO cuts over: [mesh, ZeRO]."""
        latency, per_byte = (np.where(self._is_near, near[:, i : i + 1], far[:, i : i + 1]) for i in (0, 1))
        return self._has_copies * (calls * latency + num_bytes * per_byte)

    def _scatter_s(self, num_bytes: Any, calls: Any) -> Any:
        """Summing and cutting gradients, and summing the parts with those of the copies."""
        talk = self._talk
        each = calls * talk.copies[:, :1] + num_bytes / talk.near_ranks[:, None] * talk.copies[:, 1:]
        copies = self._has_copies * np.where(self._is_near, each, 0.0)
        return self._shards_s(talk.scatter, talk.near_scatter, num_bytes, calls) + copies

    def seconds(self, schedule: Schedule) -> Any:
        """[mesh, ZeRO]"""
        if schedule.per_rank > 1:
            return self._rounds_s(schedule)
        m, p = self.m[:, None], self.pp[:, None]
        mean = self.forward + self.backward
        slowest = np.maximum(mean, self.chain.slowest_unit_s)
        if schedule.name in ("1f1b", "gpipe"):
            total = (m - 1) * slowest + p * mean
        else:
            total = m * slowest + self._bubble_s(schedule, self.forward, self.backward)
        return self.settings.least_factor * (total + self.after)

    def _rounds_s(self, schedule: Schedule) -> Any:
        """Several stages a rank, which recompute alike: by the first mode that does not surely exceed the memory.

        When the first microbatch comes back to the first rank, that has at least a whole round in flight: p microbatches on each of its
        stages, or under a V p on one; none of its stages keeps less than the smallest.
        """
        v, m, p = schedule.per_rank, self.m[:, None], self.pp[:, None]
        is_v = schedule.name in SPLITTING
        held = np.minimum(m, p) * (1 if is_v else v)
        found = np.full(self.forward.shape, np.inf)
        open_ones = np.ones(self.forward.shape, dtype=bool)
        for mode in self.settings.modes:
            again = self.chain.recompute_s[mode][-1] / p
            mean = self.forward + self.backward + again
            slowest = np.maximum(mean, self.chain.slowest_unit_s)
            bubble = self._bubble_s(schedule, self.forward / v, (self.backward + again) / v)
            total = m * slowest + bubble + self.after
            least = held * self._least_saved(mode, v)[:, None]
            fits = open_ones & (least <= self.settings.limit_bytes)
            found[fits] = total[fits]
            open_ones &= ~fits
        return self.settings.least_factor * found

    def _least_saved(self, mode: Recompute, per_rank: int) -> Array:
        """For each mesh what the smallest of its stages keeps of a microbatch."""
        if mode not in self._least:
            kept = np.array([unit.kept[mode].saved_bytes for unit in self.chain.kinds], dtype=np.float64)
            self._least[mode] = (self._compositions @ kept).min(axis=1)
        num_stages = (self.pp * per_rank).astype(np.int64)
        is_there = num_stages < len(self._least[mode])
        found: Array = np.where(is_there, self._least[mode][np.where(is_there, num_stages, 0)], 0.0)
        return found

    def _bubble_s(self, schedule: Schedule, forward: Any, backward: Any) -> Any:
        m, p = self.m[:, None], self.pp[:, None]
        if schedule.name in SPLITTING:
            late = LATE_BUBBLES.get(schedule.name, 0.0) * np.maximum(0.0, 2 * p - m) / p
            return (p - 1) * forward * (1 + late)
        return (p - 1) * (forward + backward)
