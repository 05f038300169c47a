"""What is placed: nodes with their compute, tensors with their transfer; and what a placement costs.

The objective is that of Tarnawski et al., "Efficient Algorithms for Device Placement of DNN Graph Operators" (NeurIPS 2020), throughput:

    stage time   = max over devices d of load(d)
    load(d)      = Σ compute_s(v)  over the nodes v on d                                  on an accelerator
                 + Σ transfer_s(t) over the tensors t made on d and used on another device     (sent, once per tensor)
                 + Σ transfer_s(t) over the tensors t made elsewhere and used on d             (received, once per device)
    load(host)   = Σ host_compute_s(v) over the nodes v on the host

A tensor is a *net*: the set of its maker and its users. Every device that touches a net which is not wholly its own pays the net once:
what hypergraph partitioners call the sum of external degrees.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from shardstage.errors import PlanError

__all__ = ["Placement", "PlacementGraph", "Tensor", "device_loads_s", "device_memory_bytes", "stage_time_s"]


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """The output of node ``producer``, needed by the nodes ``consumers``; moving it in or out of a device takes ``transfer_s``."""

    producer: int
    consumers: tuple[int, ...]
    transfer_s: float


@dataclass(frozen=True, kw_only=True)
class PlacementGraph:
    """A directed acyclic graph of ops; nodes are 0 … len(compute_s) - 1.

    ``colocation``: nodes with the same number (not None) share a device. ``is_backward``: nodes of the backward pass; contiguity is
    asked of the forward nodes and the backward nodes follow their colocation. ``on_accelerator``: False where only the host can run a node.
    Empty tuples mean: no memory, no colocation, all forward, all on accelerators, host as fast as an accelerator.
    """

    compute_s: tuple[float, ...]
    tensors: tuple[Tensor, ...]
    memory_bytes: tuple[float, ...] = ()
    host_compute_s: tuple[float, ...] = ()
    colocation: tuple[int | None, ...] = ()
    is_backward: tuple[bool, ...] = ()
    on_accelerator: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        defaults: dict[str, tuple[object, ...]] = {
            "memory_bytes": (0.0,) * self.num_nodes,
            "host_compute_s": self.compute_s,
            "colocation": (None,) * self.num_nodes,
            "is_backward": (False,) * self.num_nodes,
            "on_accelerator": (True,) * self.num_nodes,
        }
        for name, default in defaults.items():
            if not getattr(self, name):
                object.__setattr__(self, name, default)
            if len(getattr(self, name)) != self.num_nodes:
                raise PlanError(
                    f"{name} has {len(getattr(self, name))} entries for {self.num_nodes} nodes: one for each is needed",
                    hint=f"leave {name} out for its default",
                )
        self._check_numbers()
        self._check_acyclic()

    @property
    def num_nodes(self) -> int:
        return len(self.compute_s)

    @property
    def edges(self) -> tuple[tuple[int, int, int], ...]:
        """(producer, consumer, index of the tensor) of every use."""
        return tuple((t.producer, c, i) for i, t in enumerate(self.tensors) for c in t.consumers)

    def _check_numbers(self) -> None:
        for name in ("compute_s", "memory_bytes", "host_compute_s"):
            for node, value in enumerate(getattr(self, name)):
                if not (math.isfinite(value) and value >= 0):
                    raise PlanError(
                        f"{name} of node {node} is {value}: it must be finite and not negative",
                        hint=f"{name} >= 0",
                    )
        for index, tensor in enumerate(self.tensors):
            if not (math.isfinite(tensor.transfer_s) and tensor.transfer_s >= 0):
                raise PlanError(
                    f"transfer_s of tensor {index} is {tensor.transfer_s}: it must be finite and not negative",
                    hint="transfer_s >= 0",
                )
            for node in (tensor.producer, *tensor.consumers):
                if not 0 <= node < self.num_nodes:
                    raise PlanError(
                        f"tensor {index} names node {node}, and there are {self.num_nodes} nodes",
                        hint=f"nodes are 0 … {self.num_nodes - 1}",
                    )

    def _check_acyclic(self) -> None:
        waiting_for = [0] * self.num_nodes
        users: list[list[int]] = [[] for _ in range(self.num_nodes)]
        for tail, head, _ in self.edges:
            waiting_for[head] += 1
            users[tail].append(head)
        ready = [node for node in range(self.num_nodes) if not waiting_for[node]]
        for node in ready:
            for user in users[node]:
                waiting_for[user] -= 1
                if not waiting_for[user]:
                    ready.append(user)
        if len(ready) < self.num_nodes:
            stuck = next(node for node in range(self.num_nodes) if waiting_for[node])
            raise PlanError(
                f"node {stuck} needs its own result: a graph to place has no cycle",
                hint="break the cycle at a recurrent edge",
            )


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where each node runs: accelerators are 0 … num_devices - 1, hosts come after them.

    ``lower_bound_s``: no placement of its kind (contiguous, or any) is faster.
    ``gap_ratio`` = stage_time_s / lower_bound_s - 1; 0 is a proof of optimality. ``method`` says in words how it was found.
    """

    device_of: tuple[int, ...]
    stage_time_s: float
    lower_bound_s: float
    method: str

    @property
    def gap_ratio(self) -> float:
        return self.stage_time_s / self.lower_bound_s - 1 if self.lower_bound_s > 0 else 0.0


def device_loads_s(
    graph: PlacementGraph, device_of: Sequence[int], *, num_devices: int, num_hosts: int = 0
) -> tuple[float, ...]:
    """Seconds of compute and communication of each device, accelerators first."""
    loads = [0.0] * (num_devices + num_hosts)
    for node, device in enumerate(device_of):
        loads[device] += graph.compute_s[node] if device < num_devices else graph.host_compute_s[node]
    for tensor in graph.tensors:
        touched = {device_of[node] for node in (tensor.producer, *tensor.consumers)}
        if len(touched) > 1:
            for device in touched:
                loads[device] += tensor.transfer_s if device < num_devices else 0.0
    return tuple(loads)


def device_memory_bytes(
    graph: PlacementGraph, device_of: Sequence[int], *, num_devices: int, num_hosts: int = 0
) -> tuple[float, ...]:
    """Bytes on each device, accelerators first."""
    held = [0.0] * (num_devices + num_hosts)
    for node, device in enumerate(device_of):
        held[device] += graph.memory_bytes[node]
    return tuple(held)


def stage_time_s(
    graph: PlacementGraph, device_of: Sequence[int], *, num_devices: int, num_hosts: int = 0
) -> float:
    """The largest load: the seconds between two samples when the devices work as a pipeline."""
    return max(device_loads_s(graph, device_of, num_devices=num_devices, num_hosts=num_hosts))
