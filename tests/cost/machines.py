"""A machine with round numbers, so that prices can be worked out by hand."""

from __future__ import annotations

from shardstage.cluster import Cluster, DeviceClass, LinkLevel


def round_machine(
    num_devices: int = 8,
    *,
    memory_bytes: int = 2**40,
    kind: str = "cuda",
    op_latency_s: float = 0.0,
    node: int = 4,
    latency_s: float = 0.0,
) -> Cluster:
    """1 TFLOP/s, 1 GB/s of memory, 1 GB/s within a node of four and 0.1 GB/s between nodes."""
    device = DeviceClass(
        name="round",
        kind=kind,
        memory_bytes=memory_bytes,
        bytes_per_s=1e9,
        flops_per_s={"float32": 1e12, "bfloat16": 1e12},
        op_latency_s=op_latency_s,
        source="made up",
        flops_source="made up",
    )
    levels = (
        LinkLevel(name="node", size=node, latency_s=latency_s, bytes_per_s=1e9, source="made up"),
        LinkLevel(name="network", size=64, latency_s=latency_s, bytes_per_s=1e8, source="made up"),
    )
    return Cluster(name="round", device=device, num_devices=num_devices, levels=levels)
