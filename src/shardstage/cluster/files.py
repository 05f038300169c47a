"""Clusters by name: presets, files, and sums of both such as ``a100-40:8+h100:8``."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any, Final

from shardstage.cluster.cluster import Cluster
from shardstage.cluster.trees import joint_network
from shardstage.errors import ClusterError

__all__ = ["join", "load", "more_devices", "preset_names", "save"]

LARGEST_BOX: Final = 4
"""Unlike devices that somebody has in one machine: what a workstation has slots for, our estimate."""


def load(spec: str | os.PathLike[str]) -> Cluster:
    """A cluster by a preset's name or a file's path, optionally with a number of devices: ``"h100:512"``.

    A sum joins several, in rank order: ``"a100-40:8+h100:8"``. A preset grows with the number of devices that is asked
    of it: its outermost level then joins more than its source had, and ``notes`` say so.
    """
    name = os.fspath(spec)
    if "+" not in name or Path(_split_count(name)[0]).is_file():
        return _load_one(name)
    terms = [term.strip() for term in name.split("+")]
    if not all(terms):
        raise ClusterError(f"a part of {name!r} has no name", hint="a100-40:8+h100:8")
    for term in terms:
        if _split_count(term)[1] == 0:
            raise ClusterError(
                f"the part {term!r} of {name!r} has no devices",
                hint="+".join(each for each in terms if _split_count(each)[1] != 0) or "a100-40:8+h100:8",
            )
    return join([_load_one(term) for term in terms])


def join(clusters: Sequence[Cluster], *, name: str | None = None) -> Cluster:
    """One cluster of the devices of several, in rank order, over the slowest of their networks.

    ClusterError where one has several parts itself, or where none has a network.
    """
    name = name or "+".join(f"{cluster.name}:{cluster.num_devices}" for cluster in clusters)
    network = joint_network([(cluster.num_devices, cluster.levels) for cluster in clusters])
    if network is None:
        raise ClusterError(
            f"none of the parts of {name!r} has a network to join them over: each is one {clusters[0].levels[0].name}",
            hint='add a second level to one of their files:\n[[level]]\nname = "network"\nsize = 64',
        )
    speed = f"{network.bytes_per_s / 1e9:g} GB/s and {network.latency_s * 1e6:g} µs"
    notes = [note for cluster in clusters for note in cluster.notes]
    notes.append(f"between parts: the slowest of their networks, {speed}; nothing was measured there")
    if _fit_one_box(clusters):
        file = f"from shardstage.cluster import load, save; save(load('{name}'), 'box.toml')"
        notes.append(
            "parts that share a box are joined faster than that: edit bytes_per_s and latency_s under [network], and these notes, of the "
            f'file that python -c "{file}" writes, and plan with --cluster box.toml'
        )
    return Cluster.of_parts(tuple(clusters), name=name, network=network, notes=tuple(notes))


def _fit_one_box(clusters: Sequence[Cluster]) -> bool:
    """Whether so few GPUs may be in one machine, though each part is a machine of its own."""
    is_small = sum(cluster.num_devices for cluster in clusters) <= LARGEST_BOX
    return (
        is_small
        and all(each.device.kind == "cuda" for each in clusters)
        and all(each.num_devices <= each.devices_per(each.levels[0]) for each in clusters)
    )


def save(cluster: Cluster, path: str | os.PathLike[str]) -> None:
    """Writes the cluster's file; ClusterError when it cannot be written."""
    try:
        Path(path).write_text(cluster.to_toml(), encoding="utf-8")
    except OSError as error:
        raise ClusterError(
            f"cannot write the cluster file {path}: {error.strerror}", hint="choose another path"
        ) from error


def more_devices(cluster: Cluster, num_devices: int) -> str:
    """What to type for a cluster like this one with so many devices; a machine that was measured is measured again."""
    if not cluster.name.endswith("-measured") or num_devices <= cluster.capacity:
        return f"--cluster {cluster.name}:{num_devices}"
    return f"shardstage probe --ranks {num_devices} --out cluster.toml, then --cluster cluster.toml"


def preset_names() -> tuple[str, ...]:
    """The names that ``load`` knows without a file."""
    names = (entry.name for entry in _presets().iterdir())
    return tuple(sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml")))


def _load_one(spec: str) -> Cluster:
    base, count = _split_count(spec)
    if base in preset_names():
        text = (_presets() / f"{base}.toml").read_text(encoding="utf-8")
        cluster = Cluster.from_toml(text, where=f"preset {base}")
        return cluster if count is None else _grown(cluster, count).with_devices(count)
    cluster = Cluster.from_toml(_read(Path(base)), where=base)
    return cluster if count is None else cluster.with_devices(count)


def _grown(cluster: Cluster, num_devices: int) -> Cluster:
    """The cluster with an outermost level that joins so many; itself where it does already or has no network."""
    if num_devices <= cluster.capacity or len(cluster.levels) == 1:
        return cluster
    *inner, network = cluster.levels
    per_node = cluster.devices_per(inner[-1])
    wider = replace(network, size=-(-num_devices // per_node))
    note = (
        f"{cluster.name}: its {network.name} is sourced for {cluster.capacity} devices and taken to join {num_devices} "
        "with the same latency and bandwidth"
    )
    return replace(cluster, levels=(*inner, wider), notes=(*cluster.notes, note))


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
