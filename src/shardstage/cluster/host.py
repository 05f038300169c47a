"""``HostShare``: what one device has of the host that it is plugged into."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shardstage.cluster.table import Table
from shardstage.errors import ClusterError

__all__ = ["HostShare"]


@dataclass(frozen=True, kw_only=True, slots=True)
class HostShare:
    """A device's part of its host, where all devices of the host work at once; every number says its source.

    ``link_bytes_per_s`` go between pinned host memory and the device, each way; ``memory_bytes_per_s`` count reading plus writing of
    host memory, of which ``memory_bytes`` are the device's.
    """

    link_bytes_per_s: float
    memory_bytes_per_s: float
    memory_bytes: int
    source: str

    def __post_init__(self) -> None:
        for name in ("link_bytes_per_s", "memory_bytes_per_s", "memory_bytes"):
            if not getattr(self, name) > 0:
                raise ClusterError(
                    f"a device's share of its host: {name} must be above zero, not {getattr(self, name)}",
                    hint=f"[device.host]\n{name} = 2e10",
                )

    def to_table(self) -> dict[str, Any]:
        return {
            "link_bytes_per_s": self.link_bytes_per_s,
            "memory_bytes_per_s": self.memory_bytes_per_s,
            "memory_bytes": self.memory_bytes,
            "source": self.source,
        }

    @staticmethod
    def from_table(table: Table) -> HostShare:
        share = HostShare(
            link_bytes_per_s=table.number("link_bytes_per_s"),
            memory_bytes_per_s=table.number("memory_bytes_per_s"),
            memory_bytes=table.integer("memory_bytes"),
            source=table.text("source"),
        )
        table.done()
        return share
