"""Devices of one class under a tree of link levels."""

from __future__ import annotations

import math
import os
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Final

from shardstage.cluster.calibration import Calibration
from shardstage.cluster.device import DeviceClass
from shardstage.cluster.links import (
    CollectiveCurve,
    CollectiveKind,
    Crossing,
    LinearCost,
    LinkLevel,
    crossings,
    derived_cost,
    require_kind,
    rescaled_cost,
)
from shardstage.cluster.table import Table, to_toml
from shardstage.errors import ClusterError

__all__ = ["Cluster", "load", "preset_names", "save"]

FORMAT_VERSION: Final = 1


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """``num_devices`` devices of one class, rank by rank in the order of the tree.

        levels = (node of 8, network of 64)     ranks 0..7 share a node, ranks 0..511 the network

    ``levels`` are innermost first and may join more devices than are used. ``calibration`` is what this cluster's own
    runs say about predictions.
    """

    name: str
    device: DeviceClass
    num_devices: int
    levels: tuple[LinkLevel, ...]
    collectives: tuple[CollectiveCurve, ...] = ()
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        if not self.levels:
            raise ClusterError(f"cluster {self.name!r} has no link level", hint='[[level]]\nname = "node"')
        if not 1 <= self.num_devices <= self.capacity:
            raise ClusterError(
                f"cluster {self.name!r} joins at most {self.capacity} devices, not {self.num_devices}",
                hint=f"{self.name}:{self.capacity}, or raise `size` of the level {self.levels[-1].name!r}",
            )
        keys = [(curve.kind, curve.group) for curve in self.collectives]
        for key in sorted({key for key in keys if keys.count(key) > 1}):
            raise ClusterError(
                f"cluster {self.name!r} has two {key[0]} curves of {key[1]} ranks", hint="remove one"
            )
        if self.calibration is not None and self.calibration.device_kind != self.device.kind:
            raise ClusterError(
                f"cluster {self.name!r} has devices of kind {self.device.kind}, and a calibration from runs on "
                f"{self.calibration.device_kind}",
                hint="remove [calibration], or: shardstage calibrate RUN --cluster cluster.toml",
            )

    @property
    def capacity(self) -> int:
        """How many devices the levels can join."""
        return math.prod(level.size for level in self.levels)

    def with_devices(self, num_devices: int) -> Cluster:
        """The same machine with another number of its devices in use."""
        return replace(self, num_devices=num_devices)

    def level_for(self, ranks: int | Sequence[int]) -> LinkLevel:
        """The innermost level that joins a group of ranks; a number stands for the first so many ranks."""
        crossed = self._crossings(_as_ranks(ranks))
        return crossed[-1].level if crossed else self.levels[0]

    def devices_per(self, level: LinkLevel) -> int:
        """How many devices one instance of a level joins."""
        return math.prod(inner.size for inner in self.levels[: self.levels.index(level) + 1])

    def collective(self, kind: CollectiveKind, ranks: int | Sequence[int]) -> LinearCost:
        """What one collective over a group costs; a number stands for the first so many ranks.

        A measured curve of this kind over the same links counts before the levels: that of the nearest group size.
        """
        group = _as_ranks(ranks)
        crossed = self._crossings(group)
        require_kind(kind)
        if not crossed:
            return LinearCost(0.0, math.inf)
        curves = [curve for curve in self.collectives if curve.kind == kind and self._covers(curve, crossed)]
        if not curves:
            return derived_cost(kind, len(group), crossed)
        nearest = min(curves, key=lambda curve: abs(math.log(curve.group / len(group))))
        return rescaled_cost(nearest, len(group))

    def to_toml(self) -> str:
        """The text of a cluster file; ``from_toml`` reads the equal cluster back."""
        return to_toml(
            {
                "version": FORMAT_VERSION,
                "name": self.name,
                "num_devices": self.num_devices,
                "device": self.device.to_table(),
                "level": [level.to_table() for level in self.levels],
                "collective": [curve.to_table() for curve in self.collectives],
                **({} if self.calibration is None else {"calibration": self.calibration.to_table()}),
            }
        )

    @staticmethod
    def from_toml(text: str, *, where: str = "cluster") -> Cluster:
        """A cluster from the text of its file; ``where`` names the file in errors."""
        table = Table(_toml(text, where), where)
        version = table.integer("version")
        if version != FORMAT_VERSION:
            raise ClusterError(
                f"{where}: version {version} of the format is unknown", hint=f"version = {FORMAT_VERSION}"
            )
        cluster = Cluster(
            name=table.text("name"),
            num_devices=table.integer("num_devices"),
            device=DeviceClass.from_table(table.table("device")),
            levels=tuple(LinkLevel.from_table(entry) for entry in table.tables("level")),
            collectives=tuple(CollectiveCurve.from_table(entry) for entry in table.tables("collective")),
            calibration=Calibration.from_table(table.table("calibration"))
            if table.has("calibration")
            else None,
        )
        table.done()
        return cluster

    def _crossings(self, group: Sequence[int]) -> tuple[Crossing, ...]:
        if not group or len(set(group)) != len(group) or min(group) < 0 or max(group) >= self.num_devices:
            raise ClusterError(
                f"{_shown(group)} is no group of distinct ranks of the {self.num_devices} of {self.name!r}",
                hint=f"{self.name}:{max(group, default=0) + 1}",
            )
        return crossings(group, self.levels)

    def _covers(self, curve: CollectiveCurve, crossed: tuple[Crossing, ...]) -> bool:
        """Whether the curve's group leaves over the same outermost level with as many lanes."""
        if curve.group > self.capacity:
            return False
        measured = crossings(range(curve.group), self.levels)[-1]
        return (measured.depth, measured.lanes) == (crossed[-1].depth, crossed[-1].lanes)


def load(spec: str | os.PathLike[str]) -> Cluster:
    """A cluster by a preset's name or a file's path, optionally with a number of devices: ``"h100:512"``."""
    base, count = _split_count(os.fspath(spec))
    if base in preset_names():
        text = (_presets() / f"{base}.toml").read_text(encoding="utf-8")
        cluster = Cluster.from_toml(text, where=f"preset {base}")
    else:
        cluster = Cluster.from_toml(_read(Path(base)), where=base)
    return cluster if count is None else cluster.with_devices(count)


def save(cluster: Cluster, path: str | os.PathLike[str]) -> None:
    """Writes the cluster's file; ClusterError when it cannot be written."""
    try:
        Path(path).write_text(cluster.to_toml(), encoding="utf-8")
    except OSError as error:
        raise ClusterError(
            f"cannot write the cluster file {path}: {error.strerror}", hint="choose another path"
        ) from error


def preset_names() -> tuple[str, ...]:
    """The names that ``load`` knows without a file."""
    names = (entry.name for entry in _presets().iterdir())
    return tuple(sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml")))


def _presets() -> Any:
    return resources.files("shardstage.cluster") / "presets"


def _split_count(spec: str) -> tuple[str, int | None]:
    match = re.fullmatch(r"(.+):(\d+)", spec)
    return (match[1], int(match[2])) if match else (spec, None)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ClusterError(
            f"{str(path)!r} is neither a preset nor a cluster file that can be read: {reason}",
            hint=f"presets: {', '.join(preset_names())}; or measure this machine: shardstage probe",
        ) from error


def _toml(text: str, where: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ClusterError(
            f"{where} is not TOML: {error}", hint="shardstage probe writes a valid file"
        ) from error


def _as_ranks(ranks: int | Sequence[int]) -> Sequence[int]:
    return range(ranks) if isinstance(ranks, int) else ranks


def _shown(group: Sequence[int]) -> str:
    return str(list(group)) if len(group) <= 8 else f"[{group[0]}, {group[1]}, … {group[-1]}]"
