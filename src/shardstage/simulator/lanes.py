"""``lanes_of``: the ranks that must be simulated, one for each class of alike ones.

    rows of a Program      pp 0: dp 0-3 × tp 0-1        pp 1: dp 0-1 × tp 0-1, dp 2-3 × tp 0-1
    classes of dp          {0, 1} {2, 3}: in the same rows at every pp        classes of tp   {0, 1}
    lanes                  pp 0, 1 × 2 × 1 = 4 instead of 16 ranks

A lane stands for all ranks at its pp, of its dp class and its tp class. Classes are refined until they are a product, so that every group
of ranks along an axis meets the same lanes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shardstage.layout import Mesh
from shardstage.program import Instruction, Program

__all__ = ["Lane", "Lanes", "lanes_of"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Lane:
    """One simulated rank: ``number`` among the lanes, ``dp_class`` and ``tp_class`` as numbers, ``sizes`` of its microbatches."""

    number: int
    rank: int
    pp: int
    dp_class: int
    tp_class: int
    sizes: tuple[int, ...]
    instructions: tuple[Instruction, ...]


@dataclass(frozen=True, kw_only=True)
class Lanes:
    """All lanes; ``dp_classes`` and ``tp_classes`` are coordinates by class."""

    mesh: Mesh
    lanes: tuple[Lane, ...]
    dp_classes: tuple[tuple[int, ...], ...]
    tp_classes: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.lanes)

    def at(self, pp: int, dp_class: int, tp_class: int) -> Lane:
        return self.lanes[(pp * len(self.dp_classes) + dp_class) * len(self.tp_classes) + tp_class]

    def alike(self, lane: Lane) -> tuple[int, ...]:
        """The ranks that a lane stands for, in order."""
        return tuple(
            self.mesh.rank(pp=lane.pp, dp=dp, tp=tp)
            for dp in self.dp_classes[lane.dp_class]
            for tp in self.tp_classes[lane.tp_class]
        )

    def num_alike(self, lane: Lane) -> int:
        """How many ranks a lane stands for."""
        return len(self.dp_classes[lane.dp_class]) * len(self.tp_classes[lane.tp_class])

    def group(self, lane: Lane, axis: str) -> tuple[int, ...]:
        """The ranks that a collective of the lane's rank along ``axis`` (``tp``, ``dp``, ``world``, ``tie0+3``) joins."""
        mesh = self.mesh
        if axis == "world":
            return tuple(range(mesh.world_size))
        if axis == "tp":
            return mesh.group(lane.rank, "tp")
        if axis == "dp":
            return mesh.group(lane.rank, "dp")
        dp, tp = mesh.coordinate(lane.rank, "dp"), mesh.coordinate(lane.rank, "tp")
        return tuple(mesh.rank(pp=pp, dp=dp, tp=tp) for pp in tied_ranks(axis))

    def members(self, lane: Lane, axis: str) -> tuple[int, ...]:
        """The numbers of the lanes that the ranks of that group belong to."""
        pp, dp, tp = lane.pp, lane.dp_class, lane.tp_class
        match axis:
            case "world":
                return tuple(range(len(self.lanes)))
            case "tp":
                return tuple(self.at(pp, dp, other).number for other in range(len(self.tp_classes)))
            case "dp":
                return tuple(self.at(pp, other, tp).number for other in range(len(self.dp_classes)))
            case _:
                return tuple(self.at(other, dp, tp).number for other in tied_ranks(axis))


def tied_ranks(axis: str) -> tuple[int, ...]:
    """The pipeline ranks of an axis like ``tie0+3``."""
    return tuple(int(pp) for pp in axis.removeprefix("tie").split("+"))


def lanes_of(program: Program, special_ranks: Sequence[int] = (), devices: Sequence[range] = ()) -> Lanes:
    """The lanes of a program, ``special_ranks`` in classes of their own, apart from those on other ``devices``: ranks of each class.

    Linear in the coordinates that rows name, not in ranks, where all devices are alike.
    """
    mesh = program.mesh
    keys_of_dp: list[list[object]] = [[sizes] for sizes in program.samples]
    keys_of_tp: list[list[object]] = [[] for _ in range(mesh.tp)]
    for number, row in enumerate(program.rows):
        for dp in row.dp:
            keys_of_dp[dp].append(number)
        for tp in row.tp:
            keys_of_tp[tp].append(number)
    for rank in special_ranks:
        keys_of_dp[mesh.coordinate(rank, "dp")].append(("special", rank))
        keys_of_tp[mesh.coordinate(rank, "tp")].append(("special", rank))
    for number, ranks in enumerate(devices):
        for rank in ranks[: max(0, mesh.world_size - ranks.start)]:
            keys_of_dp[mesh.coordinate(rank, "dp")].append((number, mesh.coordinate(rank, "pp")))
    dp_classes, tp_classes = _classes(keys_of_dp), _classes(keys_of_tp)
    lanes: list[Lane] = []
    for pp in range(mesh.pp):
        for dp_class, dps in enumerate(dp_classes):
            for tp_class, tps in enumerate(tp_classes):
                rank = mesh.rank(pp=pp, dp=dps[0], tp=tps[0])
                lanes.append(
                    Lane(
                        number=len(lanes),
                        rank=rank,
                        pp=pp,
                        dp_class=dp_class,
                        tp_class=tp_class,
                        sizes=program.samples[dps[0]],
                        instructions=program.row_of(rank).instructions,
                    )
                )
    return Lanes(mesh=mesh, lanes=tuple(lanes), dp_classes=dp_classes, tp_classes=tp_classes)


def _classes(keys: Sequence[list[object]]) -> tuple[tuple[int, ...], ...]:
    """Coordinates with equal keys together, in order of their first."""
    found: dict[tuple[object, ...], list[int]] = {}
    for coordinate, key in enumerate(keys):
        found.setdefault(tuple(key), []).append(coordinate)
    return tuple(map(tuple, found.values()))
