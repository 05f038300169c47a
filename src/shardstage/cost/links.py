"""``Links``: what talking along each axis of a mesh costs on a cluster."""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from shardstage.cluster import Cluster, CollectiveKind
from shardstage.layout import Mesh

__all__ = ["Links"]

HIDDEN_RATIO: Final = MappingProxyType({"cuda": 1.0, "cpu": 0.0})
"""Share of compute that communication can run beside, by kind of device. A collective over CPU ranks is computed by their own cores."""

_DP_KINDS: Final[tuple[CollectiveKind, ...]] = ("all_reduce", "all_gather", "reduce_scatter")


class Links:
    """Costs of the groups of the mesh's first rank; the others are alike."""

    def __init__(self, cluster: Cluster, mesh: Mesh) -> None:
        stride = mesh.dp * mesh.tp  # ranks from one stage to the next
        last = (mesh.pp - 1) * stride
        self.cluster = cluster
        self.hidden_ratio = HIDDEN_RATIO.get(cluster.device.kind, 0.0)
        self._dp = {kind: cluster.collective(kind, mesh.group(0, "dp")) for kind in _DP_KINDS}
        self._tp_gather = cluster.collective("all_gather", range(mesh.tp))
        self._next_stage = cluster.collective("p2p", (0, stride) if mesh.pp > 1 else (0,))
        self._tie = cluster.collective("all_reduce", (0, last) if last else (0,))
        self._world = cluster.collective("all_reduce", range(mesh.world_size))

    def dp_s(self, kind: CollectiveKind, num_bytes: float, num_calls: int = 1) -> float:
        """Seconds of ``num_calls`` collectives over dp that share ``num_bytes``."""
        cost = self._dp[kind]
        return num_calls * cost.latency_s + num_bytes / cost.bytes_per_s if num_bytes else 0.0

    def transfer_s(self, num_bytes: int) -> float:
        """Seconds from one stage to the next."""
        return self._next_stage.seconds(num_bytes)

    def tp_gather_s(self, num_bytes: float) -> float:
        """Seconds until tensor-parallel ranks have each other's parts of so many bytes."""
        return self._tp_gather.seconds(num_bytes)

    def tie_s(self, num_bytes: int) -> float:
        """Seconds of summing a parameter's gradient between the first and the last stage."""
        return self._tie.seconds(num_bytes) if num_bytes else 0.0

    def norm_s(self) -> float:
        """The one number that all ranks sum before clipping."""
        return self._world.latency_s
