"""``place_model``: which device should run which ops of a captured model, and what that gains over stages in the captured order.

    line         the captured order cut into stages: what the engine runs
    contiguous   no device needs what a later one makes: branches of the model may be stages side by side
    free         any op on any device

The engine runs stages in the captured order. The two other placements are priced, not run: they say what a model that is no chain would
gain. All three have one objective (``placement.graph``), by which a device's transfers count with its compute, so that times of stages
differ from those of ``predict``, which lets transfers pass beside compute.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from shardstage.cluster import Cluster
from shardstage.errors import PlanError
from shardstage.graph import ModelGraph
from shardstage.planner.placement.anywhere import place
from shardstage.planner.placement.contiguous import place_contiguous, place_in_order
from shardstage.planner.placement.graph import Placement, device_loads_s, device_memory_bytes
from shardstage.planner.placement.model import OpGraph, placement_graph
from shardstage.planner.search import check_size, usable_bytes

__all__ = ["PlacedModel", "place_model"]

MAX_MOVES: Final = 200_000
"""Proposals of the free search: about a second for a thousand ops."""


@dataclass(frozen=True, kw_only=True)
class PlacedModel:
    """A model's ops on ``num_devices`` devices, placed in three ways; ``gain_ratio`` is what the free one gains over the line."""

    model: ModelGraph
    ops: OpGraph
    num_devices: int
    line: Placement
    contiguous: Placement
    free: Placement

    @property
    def gain_ratio(self) -> float:
        return self.line.stage_time_s / self.free.stage_time_s - 1 if self.free.stage_time_s else 0.0

    def loads_s(self, placement: Placement) -> tuple[float, ...]:
        """Seconds of compute and transfers of each device, for one microbatch."""
        return device_loads_s(self.ops.placement, placement.device_of, num_devices=self.num_devices)

    def memory_bytes(self, placement: Placement) -> tuple[float, ...]:
        """Bytes of parameters, their state and kept activations on each device."""
        return device_memory_bytes(self.ops.placement, placement.device_of, num_devices=self.num_devices)

    def device_of_op(self, placement: Placement) -> dict[str, int]:
        """Each op's device, by its name, in captured order."""
        devices = {
            op: device
            for members, device in zip(self.ops.ops_of_node, placement.device_of, strict=True)
            for op in members
        }
        return {op.name: devices[index] for index, op in enumerate(self.model.ops)}

    def modules_of(self, placement: Placement) -> tuple[tuple[str, ...], ...]:
        """What each device runs, in captured order: the outermost modules that it runs whole, and of others ``module (op, op)``."""
        device_of = self.device_of_op(placement)
        ops = [(_path(op.module), op.name, device_of[op.name]) for op in self.model.ops]
        found: list[list[str]] = [[] for _ in range(self.num_devices)]
        for name, device in _whole_modules(ops, ()):
            found[device].append(name)
        return tuple(tuple(names) for names in found)


def place_model(
    graph: ModelGraph,
    cluster: Cluster,
    *,
    num_devices: int,
    microbatch: int,
    sequence: int | None,
    memory_limit_bytes: float | None = None,
    max_moves: int = MAX_MOVES,
    seed: int = 0,
) -> PlacedModel:
    """The ops of a model on ``num_devices`` devices of one class, in a line, contiguous and free; the same for the same ``seed``.

    Each device is taken to hold ``num_devices`` microbatches at once, which is what the first stage of 1F1B holds. The memory limit
    (default: what tensors may take on a device of the cluster) is for these and parameters with their state, not for what one op needs in
    passing. Raises PlanError where no line of stages fits, and for a cluster of several classes or of fewer devices.
    """
    if cluster.is_mixed:
        raise PlanError(
            f"cluster {cluster.name!r} has several classes of devices: operators are placed on devices of one",
            hint=f"cluster = {cluster.joined[0].name!r}",
        )
    check_size(cluster, num_devices)
    limit_bytes = usable_bytes(cluster) if memory_limit_bytes is None else memory_limit_bytes
    ops = placement_graph(
        graph, cluster, microbatch=microbatch, sequence=sequence, in_flight=max(1, num_devices)
    )
    line = place_in_order(ops.placement, num_devices, memory_limit_bytes=limit_bytes)
    contiguous = place_contiguous(ops.placement, num_devices, memory_limit_bytes=limit_bytes, seed=seed)
    free = place(
        ops.placement,
        num_devices,
        memory_limit_bytes=limit_bytes,
        max_moves=max_moves,
        time_limit_s=math.inf,
        seed=seed,
        starts={"line": line.device_of, "contiguous": contiguous.device_of},
    )
    return PlacedModel(
        model=graph, ops=ops, num_devices=num_devices, line=line, contiguous=contiguous, free=free
    )


_Path = tuple[str, ...]


def _path(module: str) -> _Path:
    return tuple(module.split(".")) if module else ()


def _whole_modules(ops: Sequence[tuple[_Path, str, int]], inside: _Path) -> Iterator[tuple[str, int]]:
    """The modules in ``inside`` that lie whole on a device, outermost ones, and ops of ``inside`` itself; each with its device."""
    devices = {device for *_, device in ops}
    if len(devices) == 1:
        yield ".".join(inside) or "the whole model", devices.pop()
        return
    own: dict[int, list[str]] = {}
    children: dict[str, list[tuple[_Path, str, int]]] = {}
    for path, name, device in ops:
        if path == inside:
            own.setdefault(device, []).append(name)
        else:
            children.setdefault(path[len(inside)], []).append((path, name, device))
    for device, names in own.items():
        yield f"{'.'.join(inside) or 'the model'} ({', '.join(names)})", device
    for name, of_child in children.items():
        yield from _whole_modules(of_child, (*inside, name))
