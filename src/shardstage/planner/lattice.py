"""``Lattice``: the meshes of a space with what talking over them costs, as arrays, computed once for each (tp, cp).

Which of them a group has depends on its microbatch and its experts alone: a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shardstage.cluster import CollectiveKind
from shardstage.cost.links import LinkCosts
from shardstage.layout import Mesh
from shardstage.planner.space import Group, Schedule, Space, Zero

__all__ = ["Lattice", "MeshTable", "Talk"]

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Talk:
    """For each mesh seconds before the first byte and for each byte of collectives, [mesh, 2], and how many ranks they are over.

    ``near`` are those that ZeRO cuts over within a node, ``copies`` the groups that hold the same parts;
    ``transfer`` is from one stage to the next.
    """

    replicas: Array
    near_ranks: Array
    gather: Array
    scatter: Array
    reduce: Array
    near_gather: Array
    near_scatter: Array
    copies: Array
    transfer: Array
    norm_s: Array


@dataclass(frozen=True)
class MeshTable:
    """``has`` [mesh, schedule, ZeRO] says what the space offers; ``share`` are the samples of the fullest data-parallel rank."""

    meshes: tuple[Mesh, ...]
    pp: Array
    dp: Array
    share: Array
    talk: Talk
    has: npt.NDArray[np.bool_]
    num_by_rule: npt.NDArray[np.int64]

    def at(self, mask: Any) -> MeshTable:
        """The meshes that the mask keeps."""
        talk = Talk(**{name: getattr(self.talk, name)[mask] for name in Talk.__dataclass_fields__})
        meshes = tuple(mesh for mesh, is_kept in zip(self.meshes, mask, strict=True) if is_kept)
        return MeshTable(
            meshes,
            self.pp[mask],
            self.dp[mask],
            self.share[mask],
            talk,
            self.has[mask],
            self.num_by_rule[mask],
        )


class Lattice:
    """The meshes of a space for a model of ``num_units`` units."""

    def __init__(self, space: Space, costs: LinkCosts, num_units: int) -> None:
        self.space = space
        self.schedules: tuple[Schedule, ...] = tuple(s for s in space.schedules if s not in space.dominated)
        self.zeros: tuple[Zero, ...] = _all_zeros(space)
        self._costs = costs
        self._num_units = num_units
        self._tables: dict[tuple[int, int], MeshTable | None] = {}

    def table(self, group: Group) -> MeshTable | None:
        """The meshes of a group; None where it has none."""
        whole = self._whole(group.tp, group.cp)
        if whole is None:
            return None
        mask = self._mask(whole, group)
        return whole.at(mask) if mask.any() else None

    def num_choices(self, group: Group) -> int:
        whole = self._whole(group.tp, group.cp)
        return 0 if whole is None else int(whole.has[self._mask(whole, group)].sum())

    def num_by_rule(self, group: Group) -> int:
        """How many choices of the group another one dominates."""
        whole = self._whole(group.tp, group.cp)
        return 0 if whole is None else int(whole.num_by_rule[self._mask(whole, group)].sum())

    def _mask(self, whole: MeshTable, group: Group) -> Any:
        return self.space.takes(group, whole.dp, whole.share)

    def _whole(self, tp: int, cp: int) -> MeshTable | None:
        if (tp, cp) not in self._tables:
            self._tables[tp, cp] = self._made(tp, cp)
        return self._tables[tp, cp]

    def _made(self, tp: int, cp: int) -> MeshTable | None:
        space = self.space
        meshes = [
            Mesh(pp=mesh.pp, dp=mesh.dp, tp=tp, cp=cp, order=order)
            for mesh in space.meshes(tp, cp)
            for order in space.orders_of(mesh)
            if mesh.pp <= self._num_units
        ]
        if not meshes:
            return None
        has, num_by_rule = self._offered(meshes)
        dp = np.array([mesh.dp for mesh in meshes], dtype=np.float64)
        return MeshTable(
            meshes=tuple(meshes),
            pp=np.array([mesh.pp for mesh in meshes], dtype=np.float64),
            dp=dp,
            share=np.ceil(space.global_batch / dp),
            talk=_talk(self._costs, meshes, space),
            has=has,
            num_by_rule=num_by_rule,
        )

    def _offered(self, meshes: Sequence[Mesh]) -> tuple[Any, Any]:
        """[mesh, schedule, ZeRO]: which choices there are; [mesh]: how many others a rule leaves out.

        Of meshes with the same tp, ZeROs depend on the number of replicas alone, schedules on pp.
        """
        space = self.space
        zeros = {mesh.num_replicas: mesh for mesh in meshes}
        of_replicas = {n: [zero in space.zeros_of(mesh) for zero in self.zeros] for n, mesh in zeros.items()}
        of_pp = {pp: self._schedules_at(pp) for pp in {mesh.pp for mesh in meshes}}
        z = np.array([of_replicas[mesh.num_replicas] for mesh in meshes], dtype=bool)
        s = np.array([of_pp[mesh.pp][0] for mesh in meshes], dtype=bool)
        ruled_out = np.array([of_pp[mesh.pp][1] for mesh in meshes], dtype=np.int64)
        return s[:, :, None] & z[:, None, :], z.sum(axis=1) * ruled_out

    def _schedules_at(self, pp: int) -> tuple[list[bool], int]:
        """Which schedules a pipeline of so many ranks has units for, and how many dominated ones."""
        offered, dominated = self.space.schedules_of(pp), self.space.dominated
        fitting = {each for each in offered if pp * each.per_rank <= self._num_units}
        return [each in fitting for each in self.schedules], len(fitting & dominated)


def _all_zeros(space: Space) -> tuple[Zero, ...]:
    levels = [Zero(level) for level in space.zeros]
    near = sorted({space.near_ranks(tp) for tp in space.tps})
    return (*levels, *(Zero(level, n) for n in near if n > 1 for level in space.zeros if level))


def _talk(costs: LinkCosts, meshes: Sequence[Mesh], space: Space) -> Talk:
    rows = []
    for mesh in meshes:
        stride, replicas = mesh.stride("cp" if mesh.cp > 1 else "dp"), mesh.num_replicas
        near = space.near_ranks(mesh.tp)
        near = near if replicas % near == 0 else 1
        rows.append(
            (
                *(replicas, near),
                *_linear(costs, "all_gather", replicas, stride),
                *_linear(costs, "reduce_scatter", replicas, stride),
                *_linear(costs, "all_reduce", replicas, stride),
                *_linear(costs, "all_gather", near, stride),
                *_linear(costs, "reduce_scatter", near, stride),
                *_linear(costs, "all_reduce", replicas // near, stride * near),
                *_linear(costs, "p2p", min(2, mesh.pp), mesh.stride("pp")),
                costs.cost("all_reduce", mesh.world_size, 1).latency_s,
            )
        )
    table = np.array(rows)
    pairs = {name: table[:, 2 + 2 * i : 4 + 2 * i] for i, name in enumerate(_PAIRS)}
    return Talk(replicas=table[:, 0], near_ranks=table[:, 1], norm_s=table[:, 16], **pairs)


_PAIRS = ("gather", "scatter", "reduce", "near_gather", "near_scatter", "copies", "transfer")


def _linear(costs: LinkCosts, kind: CollectiveKind, count: int, stride: int) -> tuple[float, float]:
    cost = costs.cost(kind, count, stride)
    return cost.latency_s, 1.0 / cost.bytes_per_s
