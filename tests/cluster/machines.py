"""Small made-up clusters with round numbers."""

from __future__ import annotations

from shardstage.cluster import Cluster, CollectiveCurve, DeviceClass, GemmCurve, LinkLevel


def device(**changes: object) -> DeviceClass:
    fields: dict[str, object] = {
        "name": "toy",
        "kind": "cpu",
        "memory_bytes": 1000,
        "bytes_per_s": 100.0,
        "flops_per_s": {"float32": 50.0, "bfloat16": 100.0},
        "source": "made up",
        "flops_source": "made up",
    }
    return DeviceClass(**{**fields, **changes})  # type: ignore[arg-type]


def level(name: str, size: int, latency_s: float, bytes_per_s: float) -> LinkLevel:
    return LinkLevel(name=name, size=size, latency_s=latency_s, bytes_per_s=bytes_per_s, source="made up")


def two_level(num_devices: int = 16, *curves: CollectiveCurve) -> Cluster:
    """Nodes of 4 devices (1 s a hop, 100 bytes/s) on a network of 4 nodes (10 s a hop, 10 bytes/s)."""
    return Cluster(
        name="toy",
        device=device(),
        num_devices=num_devices,
        levels=(
            level("node", 4, 1.0, 100.0),
            level("network", 4, 10.0, 10.0),
        ),
        collectives=curves,
    )


def curve(**changes: object) -> CollectiveCurve:
    fields: dict[str, object] = {
        "kind": "all_reduce",
        "group": 4,
        "latency_s": 3.0,
        "bytes_per_s": 40.0,
        "source": "made up",
    }
    return CollectiveCurve(**{**fields, **changes})  # type: ignore[arg-type]


def gemm_curve(*points: tuple[float, float]) -> GemmCurve:
    return GemmCurve(dtype="float32", points=points, source="made up")
