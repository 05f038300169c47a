"""Devices of one class under a tree of link levels."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import accumulate
from typing import Any, Final

from shardstage.cluster.calibration import UNCALIBRATED, Calibration
from shardstage.cluster.device import DeviceClass
from shardstage.cluster.groups import Group, cut, rising
from shardstage.cluster.links import (
    CollectiveCurve,
    CollectiveKind,
    Crossing,
    LinearCost,
    LinkLevel,
    derived_cost,
    require_kind,
    rescaled_cost,
)
from shardstage.cluster.table import Table, to_toml
from shardstage.cluster.trees import below_network, crossings, joint_crossings, joint_levels
from shardstage.errors import ClusterError

__all__ = ["Cluster", "Part"]

FORMAT_VERSION: Final = 1


@dataclass(frozen=True, kw_only=True)
class Part:
    """Neighbouring ranks on devices of one class: ``first_rank`` and the ``num_devices - 1`` after it."""

    name: str
    device: DeviceClass
    num_devices: int
    first_rank: int

    @property
    def ranks(self) -> range:
        return range(self.first_rank, self.first_rank + self.num_devices)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """``num_devices`` devices, rank by rank in the order of the tree.

        levels = (node of 8, network of 64)     ranks 0..7 share a node, ranks 0..511 the network

    ``levels`` are innermost first and may join more devices than are used. ``calibration`` is what this cluster's own
    runs say about predictions. ``notes`` say what was assumed to make it up.

    A cluster of several classes holds one cluster of each class in ``joined``, in rank order. ``device`` is then the
    first one's and ``levels`` the worst of all by position; the last level is the network between them.
    """

    name: str
    device: DeviceClass
    num_devices: int
    levels: tuple[LinkLevel, ...]
    collectives: tuple[CollectiveCurve, ...] = ()
    calibration: Calibration | None = None
    joined: tuple[Cluster, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.levels:
            raise ClusterError(f"cluster {self.name!r} has no link level", hint='[[level]]\nname = "node"')
        if self.joined:
            self._check_joined()
        elif self.num_devices < 1:
            raise ClusterError(f"cluster {self.name!r} has no devices", hint=f"{self.name}:8")
        elif self.num_devices > self.capacity:
            raise ClusterError(
                f"cluster {self.name!r} joins at most {self.capacity} devices, not {self.num_devices}",
                hint=f"{self.name}:{self.capacity}, or raise `size` of the level {self.levels[-1].name!r}",
            )
        keys = [(curve.kind, curve.group) for curve in self.collectives]
        for key in sorted({key for key in keys if keys.count(key) > 1}):
            raise ClusterError(
                f"cluster {self.name!r} has two {key[0]} curves of {key[1]} ranks", hint="remove one"
            )
        kinds = sorted({part.device.kind for part in self.parts})
        if self.calibration is not None and kinds != [self.calibration.device_kind]:
            raise ClusterError(
                f"cluster {self.name!r} has devices of kind {' and '.join(kinds)}, and a calibration from runs on "
                f"{self.calibration.device_kind}",
                hint="remove [calibration], or: shardstage calibrate RUN --cluster cluster.toml",
            )

    @staticmethod
    def of_parts(
        joined: tuple[Cluster, ...],
        *,
        name: str,
        network: LinkLevel,
        calibration: Calibration | None = None,
        notes: tuple[str, ...] = (),
    ) -> Cluster:
        """The cluster of several classes that ``network`` joins; ranks count through the parts in order."""
        if len(joined) < 2:
            raise ClusterError(
                f"cluster {name!r} joins {len(joined)} parts; it takes at least 2", hint="a100-40:8+h100:8"
            )
        return Cluster(
            name=name,
            device=joined[0].device,
            num_devices=sum(part.num_devices for part in joined),
            levels=joint_levels([part.levels for part in joined], network),
            calibration=calibration,
            joined=joined,
            notes=notes,
        )

    @property
    def is_mixed(self) -> bool:
        """Whether it has more than one part."""
        return bool(self.joined)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The classes of devices with their ranks, in rank order; one of a cluster of one class."""
        members = self.joined or (self,)
        firsts = accumulate((member.num_devices for member in members[:-1]), initial=0)
        return tuple(
            Part(
                name=member.name, device=member.device, num_devices=member.num_devices, first_rank=first_rank
            )
            for member, first_rank in zip(members, firsts, strict=True)
        )

    def part(self, index: int) -> Cluster:
        """The part as a cluster of its own, with its own levels, curves and calibration and ranks from 0."""
        members = self.joined or (self,)
        if not 0 <= index < len(members):
            raise ClusterError(
                f"cluster {self.name!r} has no part {index}: it has {len(members)}",
                hint=f"part({len(members) - 1})",
            )
        return members[index]

    def part_of(self, rank: int) -> int:
        """The index of the part that holds a rank."""
        for index, part in enumerate(self.parts):
            if rank in part.ranks:
                return index
        raise ClusterError(
            f"cluster {self.name!r} has no rank {rank}", hint=f"ranks 0 to {self.num_devices - 1}"
        )

    def device_at(self, rank: int) -> DeviceClass:
        """The class of the device that a rank runs on."""
        return self.parts[self.part_of(rank)].device

    @property
    def factors(self) -> Mapping[str, float]:
        """By cause (``CAUSES``), what seconds on ``device`` are multiplied by: 1 where there is no calibration."""
        calibration = self.calibration_of(0)
        return UNCALIBRATED if calibration is None else calibration.factors

    def calibration_of(self, part: int) -> Calibration | None:
        """What corrects predictions on a part: runs on all parts together count before those on it alone."""
        return self.calibration or self.part(part).calibration

    def uncalibrated(self) -> Cluster:
        """The same machine before anybody looked at its runs."""
        joined = tuple(part.uncalibrated() for part in self.joined)
        return replace(self, calibration=None, joined=joined)

    @property
    def price_per_hour(self) -> float | None:
        """USD per hour of all devices; None where the price of any is not known."""
        prices = [(part.num_devices, part.device.price_per_hour) for part in self.parts]
        known = [num_devices * price for num_devices, price in prices if price is not None]
        return math.fsum(known) if len(known) == len(prices) else None

    @property
    def capacity(self) -> int:
        """How many devices the levels can join; of several classes, as many as there are."""
        return self.num_devices if self.joined else math.prod(level.size for level in self.levels)

    def with_devices(self, num_devices: int) -> Cluster:
        """The same machine with another number of its devices in use; not for several classes."""
        if self.joined and num_devices != self.num_devices:
            counts = "+".join(f"{part.name}:{part.num_devices}" for part in self.parts)
            raise ClusterError(
                f"cluster {self.name!r} has {self.num_devices} devices of {len(self.joined)} parts: "
                f"{num_devices} of them could be taken from any part",
                hint=f"say how many of each part: --cluster {counts}",
            )
        return replace(self, num_devices=num_devices)

    def with_parts(self, counts: Sequence[int]) -> Cluster:
        """The same machine with so many devices of each part in use, named by them."""
        if list(counts) == [part.num_devices for part in self.parts]:
            return self
        parts = [self.part(i).with_devices(count) for i, count in enumerate(counts)]
        return Cluster.of_parts(
            tuple(parts),
            name="+".join(f"{part.name}:{count}" for part, count in zip(parts, counts, strict=True)),
            network=self.levels[-1],
            calibration=self.calibration,
            notes=self.notes,
        )

    def level_for(self, ranks: int | Sequence[int]) -> LinkLevel:
        """The innermost of ``levels`` that joins a group of ranks; a number stands for the first so many ranks."""
        group = self._group(ranks)
        members = self._members_of(group)
        if len(members) > 1:
            return self.levels[-1]
        ((part, local),) = members
        crossed = crossings(local, part.levels)
        depth = crossed[-1].depth if crossed else 0
        return self.levels[-1 if depth >= len(below_network(part.levels)) else depth]

    def devices_per(self, level: LinkLevel) -> int:
        """How many devices one instance of a level joins; of several classes, in the part where it is smallest."""
        depth = self.levels.index(level)
        if self.joined and depth == len(self.levels) - 1:
            return self.num_devices
        return math.prod(inner.size for inner in self.levels[: depth + 1])

    def collective(self, kind: CollectiveKind, ranks: int | Sequence[int]) -> LinearCost:
        """What one collective over a group costs; a number stands for the first so many ranks. O(levels) for a
        ``range`` or a number.

        A measured curve of this kind over the same links counts before the levels: that of the nearest group size. A
        group within one part costs what it costs in that part alone.
        """
        require_kind(kind)
        return self.costs_over(ranks)(kind)

    def costs_over(self, ranks: int | Sequence[int]) -> Callable[[CollectiveKind], LinearCost]:
        """``collective`` of every kind over one group, whose way through the levels is found once."""
        group = self._group(ranks)
        members = self._members_of(group)
        if len(members) == 1:
            ((part, local),) = members
            return partial(part._own_cost, len(local), crossings(local, part.levels))
        trees = [(local, below_network(part.levels)) for part, local in members]
        crossed = joint_crossings(trees, self.levels[-1])
        return lambda kind: derived_cost(kind, len(group), crossed)

    def collective_strided(
        self, kind: CollectiveKind, *, start: int = 0, stride: int, count: int
    ) -> LinearCost:
        """``collective`` over the ranks start, start + stride, … of which there are ``count``; in O(levels)."""
        if stride < 1:
            raise ClusterError(f"a group's stride is at least 1, not {stride}", hint="stride=1")
        return self.collective(kind, range(start, start + stride * count, stride))

    def to_toml(self) -> str:
        """The text of a cluster file; ``from_toml`` reads the equal cluster back."""
        return to_toml({"version": FORMAT_VERSION, **self._to_table()})

    @staticmethod
    def from_toml(text: str, *, where: str = "cluster") -> Cluster:
        """A cluster from the text of its file; ``where`` names the file in errors."""
        table = Table(_toml(text, where), where)
        version = table.integer("version")
        if version != FORMAT_VERSION:
            raise ClusterError(
                f"{where}: version {version} of the format is unknown", hint=f"version = {FORMAT_VERSION}"
            )
        return _joined_from(table) if table.has("part") else _cluster_from(table)

    def _to_table(self) -> dict[str, Any]:
        calibration = {} if self.calibration is None else {"calibration": self.calibration.to_table()}
        notes = {"notes": self.notes} if self.notes else {}
        if self.joined:
            return {
                "name": self.name,
                **notes,
                "network": self.levels[-1].to_table(),
                **calibration,
                "part": [part._to_table() for part in self.joined],
            }
        return {
            "name": self.name,
            "num_devices": self.num_devices,
            **notes,
            "device": self.device.to_table(),
            "level": [level.to_table() for level in self.levels],
            "collective": [curve.to_table() for curve in self.collectives],
            **calibration,
        }

    def _check_joined(self) -> None:
        if any(part.joined for part in self.joined):
            raise ClusterError(
                f"cluster {self.name!r} joins a cluster that has several parts itself",
                hint="join its parts one by one: a100-40:8+h100:8+b200:8",
            )
        expected = (
            self.joined[0].device,
            sum(part.num_devices for part in self.joined),
            joint_levels([part.levels for part in self.joined], self.levels[-1]),
        )
        if (self.device, self.num_devices, self.levels) != expected or self.collectives:
            raise ClusterError(
                f"the devices, levels and curves of {self.name!r} are those of its parts and cannot differ from them",
                hint="Cluster.of_parts(parts, name=…, network=…)",
            )

    def _group(self, ranks: int | Sequence[int]) -> Group:
        group = _as_group(ranks)
        lowest, highest = _ends(group) if group else (-1, 0)
        if lowest < 0 or highest >= self.num_devices or not _is_distinct(group):
            raise ClusterError(
                f"{_shown(group)} is no group of distinct ranks of the {self.num_devices} of {self.name!r}",
                hint=f"ranks 0 to {self.num_devices - 1}" if self.joined else f"{self.name}:{highest + 1}",
            )
        return group

    def _members_of(self, group: Group) -> list[tuple[Cluster, Group]]:
        """The parts that hold any of the group, each with its ranks counted from the part's first."""
        if not self.joined:
            return [(self, group)]
        cuts = (cut(group, part.first_rank, part.num_devices) for part in self.parts)
        return [(member, local) for member, local in zip(self.joined, cuts, strict=True) if local]

    def _own_cost(self, count: int, crossed: tuple[Crossing, ...], kind: CollectiveKind) -> LinearCost:
        """A collective of ``count`` ranks within a cluster of one class."""
        if not crossed:
            return LinearCost(0.0, math.inf)
        reach = (crossed[-1].depth, crossed[-1].lanes)
        curves = self._curves.get((kind, *reach))
        if curves is None:
            return derived_cost(kind, count, crossed)
        nearest = min(curves, key=lambda curve: abs(math.log(curve.group / count)))
        return rescaled_cost(nearest, count)

    @cached_property
    def _curves(self) -> dict[tuple[CollectiveKind, int, int], list[CollectiveCurve]]:
        """Measured curves by kind, and by the outermost level that their groups leave over and the lanes with which they do."""
        found: dict[tuple[CollectiveKind, int, int], list[CollectiveCurve]] = {}
        for curve in self.collectives:
            if curve.group <= self.capacity:
                outermost = crossings(range(curve.group), self.levels)[-1]
                found.setdefault((curve.kind, outermost.depth, outermost.lanes), []).append(curve)
        return found


def _joined_from(table: Table) -> Cluster:
    cluster = Cluster.of_parts(
        tuple(_cluster_from(entry) for entry in table.tables("part")),
        name=table.text("name"),
        network=LinkLevel.from_table(table.table("network")),
        calibration=_calibration_from(table),
        notes=table.texts("notes"),
    )
    table.done()
    return cluster


def _cluster_from(table: Table) -> Cluster:
    cluster = Cluster(
        name=table.text("name"),
        num_devices=table.integer("num_devices"),
        device=DeviceClass.from_table(table.table("device")),
        levels=tuple(LinkLevel.from_table(entry) for entry in table.tables("level")),
        collectives=tuple(CollectiveCurve.from_table(entry) for entry in table.tables("collective")),
        calibration=_calibration_from(table),
        notes=table.texts("notes"),
    )
    table.done()
    return cluster


def _calibration_from(table: Table) -> Calibration | None:
    return Calibration.from_table(table.table("calibration")) if table.has("calibration") else None


def _toml(text: str, where: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ClusterError(
            f"{where} is not TOML: {error}", hint="shardstage probe writes a valid file"
        ) from error


def _as_group(ranks: int | Sequence[int]) -> Group:
    return range(ranks) if isinstance(ranks, int) else rising(ranks)


def _is_distinct(group: Group) -> bool:
    return isinstance(group, range) or len(set(group)) == len(group)


def _ends(group: Group) -> tuple[int, int]:
    return (group[0], group[-1]) if isinstance(group, range) else (min(group), max(group))


def _shown(group: Group) -> str:
    return str(list(group)) if len(group) <= 8 else f"[{group[0]}, {group[1]}, … {group[-1]}]"
