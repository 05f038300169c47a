"""``Links``: what talking along each axis of a mesh costs on a cluster.

    axis         group of rank 0, as (how many ranks, how far apart)
    tp           (tp, stride of tp)
    replicas     (dp × cp, …): ranks of equal parameters, whose gradients are summed
    shards       the first of these, as many as ZeRO cuts over; their likes in other groups are copies
    ep           the first of the replicas, as many as an expert layer's experts are dealt out to; where tensor-parallel ranks hold whole
                 experts, the first of all their tensor-parallel ranks, which are neighbours

All groups of an axis talk at once; the cluster's links say what that costs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from shardstage.cluster import Cluster, CollectiveKind, DeviceClass
from shardstage.cluster.links import LinearCost
from shardstage.layout import Mesh

__all__ = ["LinkCosts", "Links", "Replicas", "each_exposed_s", "exposed_s", "overlap_slowdown"]

OVERLAP_SLOWDOWNS: Final = MappingProxyType({"cuda": 0.15, "cpu": 1.0})
"""Of devices without a kernel model. cuda: as the A100's preset. A collective over CPU ranks is computed by their own cores."""


def overlap_slowdown(device: DeviceClass) -> float:
    """Seconds of compute that each second of a collective beside it adds: 0 if neither disturbs the other, 1 if they take turns."""
    if device.kernels is not None:
        return device.kernels.overlap_slowdown
    return OVERLAP_SLOWDOWNS.get(device.kind, 1.0)


def exposed_s(talk_s: float, compute_s: float, slowdown: float, first_s: float = 0.0) -> float:
    """Seconds that ``talk_s`` of collectives add to ``compute_s`` beside which they run, all but ``first_s`` of them: a race.

    While the rest r = talk - first runs, compute does 1 - slowdown seconds of its work a second. Is compute c the longer, then what is
    left of it after r takes c - (1 - slowdown) r more: c + slowdown r in all. Is r the longer, it ends the race. So

        first + max(c + slowdown r, r) - c = max(talk - c, first + slowdown r)
    """
    return max(talk_s - compute_s, first_s + slowdown * (talk_s - first_s))


def each_exposed_s(talk_s: Any, compute_s: Any, slowdown: float, first_s: Any = 0.0) -> Any:
    """``exposed_s`` of arrays."""
    return np.maximum(talk_s - compute_s, first_s + slowdown * (talk_s - first_s))


class LinkCosts:
    """What collectives over evenly spaced groups of a cluster cost; what was asked once is kept."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._known: dict[tuple[CollectiveKind, int, int], LinearCost] = {}
        self._groups: dict[tuple[int, int], Callable[[CollectiveKind], LinearCost]] = {}

    def cost(self, kind: CollectiveKind, count: int, stride: int) -> LinearCost:
        """Of ``count`` ranks, each ``stride`` further than the one before."""
        key = (kind, count, stride)
        if key not in self._known:
            if (count, stride) not in self._groups:
                self._groups[count, stride] = self.cluster.costs_over(range(0, count * stride, stride))
            self._known[key] = self._groups[count, stride](kind)
        return self._known[key]


@dataclass(frozen=True, kw_only=True, slots=True)
class Replicas:
    """``count`` ranks that hold the same parameters, each ``stride`` further than the one before; ZeRO cuts over ``num_shards`` of them."""

    costs: LinkCosts
    count: int
    stride: int
    num_shards: int

    def sum_s(self, num_bytes: float, num_calls: int = 1) -> float:
        """Seconds of ``num_calls`` sums of ``num_bytes`` in all over all of them."""
        cost = self.costs.cost("all_reduce", self.count, self.stride)
        return num_calls * cost.latency_s + num_bytes / cost.bytes_per_s if num_bytes else 0.0

    def shards_s(self, kind: CollectiveKind, num_bytes: float, num_calls: int = 1) -> float:
        """Seconds of collectives over the ranks that ZeRO cuts over."""
        cost = self.costs.cost(kind, self.num_shards, self.stride)
        return num_calls * cost.latency_s + num_bytes / cost.bytes_per_s if num_bytes else 0.0

    def copies_s(self, num_bytes: float, num_calls: int = 1) -> float:
        """Seconds of summing parts of ``num_bytes`` in all between the groups that ZeRO cuts over."""
        cost = self.costs.cost("all_reduce", self.count // self.num_shards, self.stride * self.num_shards)
        part = num_bytes / self.num_shards
        return num_calls * cost.latency_s + part / cost.bytes_per_s if num_bytes else 0.0

    def scatter_s(self, num_bytes: float, num_calls: int = 1) -> float:
        """Seconds until gradients are summed and cut among the ranks that ZeRO cuts over, and summed with those of their copies."""
        return self.shards_s("reduce_scatter", num_bytes, num_calls) + self.copies_s(num_bytes, num_calls)


class Links:
    """Costs of the groups of the mesh's first rank; the others are alike. ``num_shards`` ranks share what ZeRO cuts (default: all).

    ``replicas`` hold the same parameters, ``expert_replicas`` the same experts.
    """

    def __init__(
        self,
        cluster: Cluster,
        mesh: Mesh,
        *,
        num_shards: int | None = None,
        ep: int = 1,
        has_whole_experts: bool = False,
        costs: LinkCosts | None = None,
    ) -> None:
        self._costs = costs or LinkCosts(cluster)
        self.cluster = cluster
        self.mesh = mesh
        self.overlap_slowdown = overlap_slowdown(cluster.device)
        self.ep = ep
        self.has_whole_experts = has_whole_experts
        self.replicas = Replicas(
            costs=self._costs,
            count=mesh.num_replicas,
            stride=mesh.stride("cp" if mesh.cp > 1 else "dp"),
            num_shards=num_shards or mesh.num_replicas,
        )

    @property
    def deals_out_experts(self) -> bool:
        """Whether ranks hold different experts, so that fewer hold the same ones."""
        return self.ep > 1 or self.has_whole_experts

    @property
    def expert_replicas(self) -> Replicas:
        whole, replicas = self.has_whole_experts, self.replicas
        holders = self.mesh.tp if whole else 1
        return Replicas(
            costs=self._costs,
            count=max(1, holders * replicas.count // self.ep),
            stride=self.ep * (1 if whole else replicas.stride),
            num_shards=max(1, holders * replicas.num_shards // self.ep),
        )

    @property
    def alone_ratio(self) -> float:
        """How many times quicker the ranks of a stage compute while those of the others wait: they compute at the same time, so that a
        pipeline has its part of the cores, however many a rank alone could use."""
        return min(self.cluster.device.alone_ratio, float(self.mesh.pp))

    def transfer_s(self, num_bytes: int) -> float:
        """Seconds from one stage to the next."""
        return self._group("p2p", min(2, self.mesh.pp), self.mesh.stride("pp")).seconds(num_bytes)

    def least_travel_s(self, num_bytes: int) -> float:
        """The same where it is surely waited for: the ends' work on cores that ranks share is counted with the rest of these."""
        return self.transfer_s(num_bytes) if self.cluster.device.alone_ratio == 1 else 0.0

    def message_s(self, num_bytes: float) -> float:
        """Seconds that sending or receiving so many bytes takes of the cores that ranks share; 0 where each has its device."""
        message = self.cluster.device.message
        return 0.0 if message is None else message.seconds(num_bytes)

    def tp_gather_s(self, num_bytes: float) -> float:
        """Seconds until tensor-parallel ranks have each other's parts of so many bytes."""
        return self._group("all_gather", self.mesh.tp, self.mesh.stride("tp")).seconds(num_bytes)

    def tp_cost(self, kind: CollectiveKind) -> LinearCost:
        return self._group(kind, self.mesh.tp, self.mesh.stride("tp"))

    @property
    def ring_cost(self) -> LinearCost:
        """Of passing a part of keys and values on to the next context-parallel rank."""
        return self._group("p2p", min(2, self.mesh.cp), self.mesh.stride("cp"))

    @property
    def deal_cost(self) -> LinearCost:
        """Of dealing out sequence parts by heads over the context-parallel ranks, for the bytes that each sends."""
        return self._group("all_to_all", self.mesh.cp, self.mesh.stride("cp"))

    @property
    def exchange_cost(self) -> LinearCost:
        """Of sending tokens to their experts' ranks, for the bytes that each needs.

        Where tensor-parallel ranks hold parts of an expert, each sends or receives its part of the tokens, and they gather what arrived, or
        scatter what leaves (Megatron-Core's alltoall dispatcher: "permute->A2A(EP)->AG(TP)").
        """
        sent = self._group("all_to_all", self.ep, 1 if self.has_whole_experts else self.replicas.stride)
        if self.has_whole_experts or self.mesh.tp == 1:
            return sent
        gathered = self._group("all_gather", self.mesh.tp, self.mesh.stride("tp"))
        seconds_per_byte = 1 / (self.mesh.tp * sent.bytes_per_s) + 1 / gathered.bytes_per_s
        return LinearCost(latency_s=sent.latency_s + gathered.latency_s, bytes_per_s=1 / seconds_per_byte)

    def tie_s(self, num_bytes: float) -> float:
        """Seconds of summing a parameter's gradient between the first and the last stage."""
        last = (self.mesh.pp - 1) * self.mesh.stride("pp")
        return self._group("all_reduce", 2 if last else 1, last or 1).seconds(num_bytes) if num_bytes else 0.0

    def norm_s(self) -> float:
        """The one number that all ranks sum before clipping."""
        return self._group("all_reduce", self.mesh.world_size, 1).latency_s

    def _group(self, kind: CollectiveKind, count: int, stride: int) -> LinearCost:
        return self._costs.cost(kind, count, stride)
