"""The process groups of one rank: one for each mesh axis, for each direction between stages, and for shared parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from shardstage.layout import Mesh

__all__ = ["RankGroups", "broadcast_from_first", "build_groups"]

Ranks = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class RankGroups:
    """Where ``rank`` stands on the mesh and the groups it is in; a group of one rank is ``None``.

    Activations and gradients between stages travel in groups of their own: NCCL runs the transfers of one group in order, and a stage
    that sends forward while it receives backward would otherwise wait for its neighbour, which waits for it.
    """

    rank: int
    mesh: Mesh
    dp_group: dist.ProcessGroup | None
    tp_group: dist.ProcessGroup | None
    forward_group: dist.ProcessGroup | None
    backward_group: dist.ProcessGroup | None
    tie_groups: Mapping[Ranks, dist.ProcessGroup]

    @property
    def pp(self) -> int:
        return self.mesh.coordinate(self.rank, "pp")

    @property
    def dp(self) -> int:
        return self.mesh.coordinate(self.rank, "dp")

    @property
    def tp(self) -> int:
        return self.mesh.coordinate(self.rank, "tp")

    def peer(self, pp: int) -> int:
        """The rank of another pipeline rank at the same dp and tp coordinates."""
        return self.mesh.rank(pp=pp, dp=self.dp, tp=self.tp)

    def gather(self, mine: Any) -> list[Any]:
        """What every rank of the world gave, by rank; collective over the world."""
        everyone: list[Any] = [mine] * self.mesh.world_size
        if self.mesh.world_size > 1:
            dist.all_gather_object(everyone, mine)
        return everyone


def build_groups(mesh: Mesh, rank: int, ties: Iterable[Ranks] = (), *, only_own: bool = False) -> RankGroups:
    """Makes all groups of the mesh; collective over the world: every rank calls it with the same mesh and ties.

    ``ties`` are the sets of pipeline ranks that hold one and the same parameter. ``only_own`` leaves out the groups that ``rank`` is not
    in, which a world of one process (a dry run) does not need and thousands of ranks would make slow.
    """
    mine: dict[str, dist.ProcessGroup | None] = {"dp": None, "tp": None}
    for axis in ("dp", "tp"):
        for ranks in [mesh.group(rank, axis)] if only_own else mesh.groups(axis):
            group = _new_group(ranks)
            if rank in ranks:
                mine[axis] = group
    everyone = tuple(range(mesh.world_size))
    has_stages = mesh.pp > 1
    tie_groups: dict[Ranks, dist.ProcessGroup] = {}
    for pps in sorted(set(ties)):
        for dp in range(mesh.dp):
            for tp in range(mesh.tp):
                ranks = tuple(mesh.rank(pp=pp, dp=dp, tp=tp) for pp in pps)
                if rank in ranks or not only_own:
                    group = _new_group(ranks)
                    if rank in ranks and group is not None:
                        tie_groups[pps] = group
    return RankGroups(
        rank=rank,
        mesh=mesh,
        dp_group=mine["dp"],
        tp_group=mine["tp"],
        forward_group=_new_group(everyone) if has_stages else None,
        backward_group=_new_group(everyone) if has_stages else None,
        tie_groups=tie_groups,
    )


def broadcast_from_first(value: Any) -> Any:
    """Rank 0's ``value`` on every rank; collective over the world."""
    box = [value]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def _new_group(ranks: tuple[int, ...]) -> dist.ProcessGroup | None:
    return dist.new_group(list(ranks)) if len(ranks) > 1 else None
