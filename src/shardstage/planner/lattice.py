"""``Lattice``: the meshes of a space with what talking over them costs, and which groups of choices have them, as arrays.

Groups of the same (tp, cp) share their meshes; which of them a group has depends on its microbatch and on its experts alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from shardstage.cluster import CollectiveKind
from shardstage.cost.links import LinkCosts
from shardstage.layout import Mesh
from shardstage.planner.space import Group, Schedule, Space, Zero, are_near

__all__ = ["Lattice", "Meshes", "Pairs", "Rows", "Talk"]

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Talk:
    """For each mesh seconds before the first byte and for each byte of collectives, [mesh, 2], and how many ranks they are over.

    ``near`` are those that ZeRO cuts over within a node, ``copies`` the groups that hold the same parts; ``gather`` and ``scatter``
    [2 × mesh, 2] are over all ranks that ZeRO cuts over, and after those of all meshes over the near ones. ``transfer`` is from one
    stage to the next.
    """

    replicas: Array
    near_ranks: Array
    gather: Array
    scatter: Array
    reduce: Array
    copies: Array
    transfer: Array
    norm_s: Array


@dataclass(frozen=True)
class Meshes:
    """All meshes of a space; ``share`` are the samples of the fullest data-parallel rank. A choice takes one of the schedules
    [mesh, schedule] and one of the ZeROs [mesh, ZeRO]; ``num_by_rule`` others are dominated."""

    sizes: tuple[Mesh, ...]
    pp: Array
    dp: Array
    share: Array
    talk: Talk
    has_schedule: Mask
    has_zero: Mask
    num_choices: Numbers
    num_by_rule: Numbers


class _Part(NamedTuple):
    """The meshes of one (tp, cp), and which of them take which microbatch [microbatch, mesh] and how many expert ranks [dealing, mesh]."""

    meshes: slice
    is_sized: Mask
    is_dealt: Mask


class Pairs(NamedTuple):
    """A group and a mesh each, by their numbers."""

    group: Numbers
    mesh: Numbers

    def at(self, numbers: Numbers) -> Pairs:
        return Pairs(*(each[numbers] for each in self))


class Rows(NamedTuple):
    """A group, a mesh and a ZeRO each, by their numbers."""

    group: Numbers
    mesh: Numbers
    zero: Numbers

    def at(self, numbers: Numbers) -> Rows:
        return Rows(*(each[numbers] for each in self))


class Lattice:
    """The groups and meshes of a space for a model of ``num_units`` units; ``groups`` are those that have a choice."""

    def __init__(self, space: Space, costs: LinkCosts, num_units: int) -> None:
        self.space = space
        self.costs = costs
        self.schedules: tuple[Schedule, ...] = tuple(s for s in space.schedules if s not in space.dominated)
        self.zeros: tuple[Zero, ...] = _all_zeros(space)
        self._num_units = num_units
        forms = (False, True) if True in space.whole_experts else (False,)
        self._dealings = {dealing: number for number, dealing in enumerate(product(space.eps, forms))}
        parts = {(tp, cp): list(self._sizes(tp, cp)) for tp in space.tps for cp in space.cps}
        self.meshes = self._made([mesh for part in parts.values() for mesh in part], costs)
        self._parts = dict(zip(parts, self._parted(parts.values(), [*parts]), strict=True))
        self._microbatches = {b: number for number, b in enumerate(space.microbatches)}
        known = self._numbers_of()
        self.groups: tuple[Group, ...] = tuple(group for group, number, _ in known if number)
        self.num_choices: Numbers = np.array([number for _, number, _ in known if number], dtype=np.int64)
        self.num_by_rule = sum(number for _, _, number in known)

    def pairs(self, groups: Numbers) -> Pairs:
        """All pairs of a group and a mesh that groups have."""
        meshes = [self._meshes_of(self.groups[number]) for number in groups.tolist()]
        of_group = np.repeat(groups, [len(each) for each in meshes])
        return Pairs(of_group, np.concatenate(meshes) if meshes else np.zeros(0, dtype=np.int64))

    def rows(self, pairs: Pairs) -> Rows:
        """Pairs with each ZeRO that they have."""
        number, zero = np.nonzero(self.meshes.has_zero[pairs.mesh])
        return Rows(pairs.group[number], pairs.mesh[number], zero)

    def _meshes_of(self, group: Group) -> Numbers:
        part = self._parts[group.tp, group.cp]
        mask = part.is_sized[self._microbatches[group.microbatch]] & part.is_dealt[self._dealing(group)]
        found: Numbers = part.meshes.start + np.flatnonzero(mask)
        return found

    def _dealing(self, group: Group) -> int:
        return self._dealings[group.ep, group.has_whole_experts]

    def _numbers_of(self) -> list[tuple[Group, int, int]]:
        """Groups with how many choices each has, and how many of them another one dominates."""
        tables = {}
        for key, part in self._parts.items():
            numbers = (each[part.meshes] for each in (self.meshes.num_choices, self.meshes.num_by_rule))
            dealt = part.is_dealt.T.astype(np.int64)
            tables[key] = [((part.is_sized * each) @ dealt).tolist() for each in numbers]
        found = []
        for group in self.space.groups():
            at = self._microbatches[group.microbatch], self._dealing(group)
            choices, ruled_out = (table[at[0]][at[1]] for table in tables[group.tp, group.cp])
            found.append((group, choices, ruled_out))
        return found

    def _sizes(self, tp: int, cp: int) -> Iterator[Mesh]:
        space = self.space
        if tp * cp > space.num_ranks:
            return
        for mesh in space.meshes(tp, cp):
            if mesh.pp <= self._num_units:
                for order in space.orders_of(mesh):
                    yield Mesh(pp=mesh.pp, dp=mesh.dp, tp=tp, cp=cp, order=order)

    def _parted(self, parts: Any, keys: Sequence[tuple[int, int]]) -> Iterator[_Part]:
        space, start = self.space, 0
        microbatch = np.array(space.microbatches, dtype=np.float64)[:, None]
        is_near = np.array([are_near(mesh) for mesh in self.meshes.sizes], dtype=bool)
        for (tp, cp), sizes in zip(keys, parts, strict=True):
            meshes = slice(start, start + len(sizes))
            start = meshes.stop
            dp, share = self.meshes.dp[meshes], self.meshes.share[meshes]
            is_dealt = [
                space.deals(tp, cp, ep, dp, is_near[meshes], is_whole=form) for ep, form in self._dealings
            ]
            yield _Part(meshes, space.sizes(microbatch, dp, share), np.array(is_dealt))

    def _made(self, meshes: Sequence[Mesh], costs: LinkCosts) -> Meshes:
        space = self.space
        dp = np.array([mesh.dp for mesh in meshes], dtype=np.float64)
        has_zero = self._zeros_of(meshes)
        has_schedule, num_dominated = self._schedules_of(meshes)
        return Meshes(
            sizes=tuple(meshes),
            pp=np.array([mesh.pp for mesh in meshes], dtype=np.float64),
            dp=dp,
            share=np.ceil(space.global_batch / dp),
            talk=_talk(costs, meshes, space),
            has_schedule=has_schedule,
            has_zero=has_zero,
            num_choices=has_schedule.sum(axis=1) * has_zero.sum(axis=1),
            num_by_rule=num_dominated * has_zero.sum(axis=1),
        )

    def _zeros_of(self, meshes: Sequence[Mesh]) -> Mask:
        """[mesh, ZeRO]: which there are, by tp and the number of replicas alone."""
        known = {(mesh.tp, mesh.num_replicas): mesh for mesh in meshes}
        zeros = {key: frozenset(self.space.zeros_of(mesh)) for key, mesh in known.items()}
        offered = {key: [zero in of_mesh for zero in self.zeros] for key, of_mesh in zeros.items()}
        found = [offered[mesh.tp, mesh.num_replicas] for mesh in meshes]
        return np.array(found, dtype=bool).reshape(len(meshes), len(self.zeros))

    def _schedules_of(self, meshes: Sequence[Mesh]) -> tuple[Mask, Numbers]:
        """[mesh, schedule]: which a pipeline of so many ranks has units for; [mesh]: how many dominated ones."""
        known = {pp: self._schedules_at(pp) for pp in {mesh.pp for mesh in meshes}}
        has = np.array([known[mesh.pp][0] for mesh in meshes], dtype=bool)
        has = has.reshape(len(meshes), len(self.schedules))
        return has, np.array([known[mesh.pp][1] for mesh in meshes], dtype=np.int64)

    def _schedules_at(self, pp: int) -> tuple[list[bool], int]:
        offered, dominated = self.space.schedules_of(pp), self.space.dominated
        fitting = {each for each in offered if pp * each.per_rank <= self._num_units}
        return [each in fitting for each in self.schedules], len(fitting & dominated)


def _all_zeros(space: Space) -> tuple[Zero, ...]:
    levels = [Zero(level) for level in space.zeros]
    near = sorted({space.near_ranks(tp) for tp in space.tps})
    return (*levels, *(Zero(level, n) for n in near if n > 1 for level in space.zeros if level))


def _talk(costs: LinkCosts, meshes: Sequence[Mesh], space: Space) -> Talk:
    replicas = [mesh.num_replicas for mesh in meshes]
    near = [space.near_ranks(mesh.tp) for mesh in meshes]
    near = [n if count % n == 0 else 1 for n, count in zip(near, replicas, strict=True)]
    stride = [mesh.stride("cp" if mesh.cp > 1 else "dp") for mesh in meshes]
    copies = [(count // n, step * n) for count, n, step in zip(replicas, near, stride, strict=True)]
    whole, part = [*zip(replicas, stride, strict=True)], [*zip(near, stride, strict=True)]
    neighbours = [(min(2, mesh.pp), mesh.stride("pp")) for mesh in meshes]

    def linear(kind: CollectiveKind, groups: Sequence[tuple[int, int]]) -> Any:
        known = {group: costs.cost(kind, *group) for group in dict.fromkeys(groups)}
        found = {group: (cost.latency_s, 1.0 / cost.bytes_per_s) for group, cost in known.items()}
        return np.array([found[group] for group in groups]).reshape(-1, 2)

    return Talk(
        replicas=np.array(replicas, dtype=np.float64),
        near_ranks=np.array(near, dtype=np.float64),
        gather=linear("all_gather", whole + part),
        scatter=linear("reduce_scatter", whole + part),
        reduce=linear("all_reduce", whole),
        copies=linear("all_reduce", copies),
        transfer=linear("p2p", neighbours),
        norm_s=linear("all_reduce", [(mesh.world_size, 1) for mesh in meshes])[:, 0],
    )
