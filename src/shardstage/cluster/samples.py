"""From measurements to a cluster: the arithmetic of the probe, apart from the machine it runs on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Final, NamedTuple

from shardstage.cluster.cluster import Cluster
from shardstage.cluster.device import DeviceClass, GemmCurve
from shardstage.cluster.fit import fit_linear
from shardstage.cluster.links import CollectiveCurve, CollectiveKind, LinearCost, LinkLevel, require_kind

__all__ = ["COLLECTIVES", "Sample", "cluster_from_samples", "group_sizes"]

COLLECTIVES: Final[tuple[CollectiveKind, ...]] = (
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "all_to_all",
    "p2p",
)


class Sample(NamedTuple):
    """One measurement: ``what`` is "gemm" (size in FLOPs), "copy" (bytes), "op", a kind of collective (bytes), a "message" (bytes; CPU
    seconds of both ends, by what share of a core a rank has), or one product while all ranks compute ("busy") and while only one does
    ("alone")."""

    what: str
    dtype: str
    group: int
    size: float
    seconds: float


def cluster_from_samples(
    samples: Sequence[Sample],
    *,
    num_ranks: int,
    device_name: str,
    device_kind: str,
    memory_bytes: int,
    source: str,
    compute_capability: float | None = None,
) -> Cluster:
    """The cluster of ``num_ranks`` devices on one host that the samples describe."""
    device = _device_from(samples, num_ranks, device_name, device_kind, memory_bytes, source)
    return Cluster(
        name=f"{device_kind}-measured",
        num_devices=num_ranks,
        device=replace(device, compute_capability=compute_capability),
        levels=(_level_from(samples, num_ranks, source),),
        collectives=_collective_curves(samples, source),
    )


def group_sizes(ranks: int) -> tuple[int, ...]:
    """The sizes of group that tile the ranks, so that all ranks talk at once: for 6, (2, 3, 6)."""
    return tuple(size for size in range(2, ranks + 1) if ranks % size == 0)


def _device_from(
    samples: Sequence[Sample], num_ranks: int, name: str, kind: str, memory_bytes: int, source: str
) -> DeviceClass:
    copy = next(sample for sample in samples if sample.what == "copy")
    op = next(sample for sample in samples if sample.what == "op")
    dtypes = dict.fromkeys(sample.dtype for sample in samples if sample.what == "gemm")
    gemm = tuple(_gemm_curve(samples, dtype, source) for dtype in dtypes)
    return DeviceClass(
        name=name,
        kind=kind,
        memory_bytes=memory_bytes,
        bytes_per_s=_rounded(2 * copy.size / copy.seconds),
        op_latency_s=_rounded(op.seconds),
        alone_ratio=_alone_ratio(samples, num_ranks),
        message=_message(samples),
        source=source,
        flops_per_s={curve.dtype: max(rate for _, rate in curve.points) for curve in gemm},
        flops_source=source,
        gemm=gemm,
    )


def _alone_ratio(samples: Sequence[Sample], num_ranks: int) -> float:
    """How many times quicker a rank is alone, as many as there are ranks at most; 1 where it was not measured."""
    seconds = {sample.what: sample.seconds for sample in samples if sample.what in ("busy", "alone")}
    if len(seconds) < 2:
        return 1.0
    return min(max(1.0, _rounded(seconds["busy"] / seconds["alone"])), float(num_ranks))


def _message(samples: Sequence[Sample]) -> LinearCost | None:
    """What a message takes of shared cores; None where it was not measured."""
    return _line(samples, "message", 2) if any(sample.what == "message" for sample in samples) else None


def _gemm_curve(samples: Sequence[Sample], dtype: str, source: str) -> GemmCurve:
    """The samples of a dtype by size; a larger product is never quicker than a smaller one."""
    points, slowest_s = [], 0.0
    for sample in samples:
        if sample.what == "gemm" and sample.dtype == dtype:
            slowest_s = max(slowest_s, sample.seconds)
            points.append((sample.size, _rounded(sample.size / slowest_s)))
    return GemmCurve(dtype=dtype, points=tuple(points), source=source)


def _collective_curves(samples: Sequence[Sample], source: str) -> tuple[CollectiveCurve, ...]:
    keys = dict.fromkeys((sample.what, sample.group) for sample in samples if sample.what in COLLECTIVES)
    return tuple(
        CollectiveCurve(
            kind=require_kind(kind),
            group=group,
            latency_s=line.latency_s,
            bytes_per_s=line.bytes_per_s,
            source=source,
        )
        for kind, group in keys
        for line in [_line(samples, kind, group)]
    )


def _level_from(samples: Sequence[Sample], num_ranks: int, source: str) -> LinkLevel:
    """All ranks share one host; one hop costs what the smallest group's exchange does."""
    groups = group_sizes(num_ranks)
    if not groups:
        return LinkLevel(
            name="host", size=1, latency_s=0.0, bytes_per_s=1e12, source="one rank: no link is used"
        )
    kind = "p2p" if groups[0] == 2 else "all_gather"
    line = _line(samples, kind, groups[0])
    hops = 1 if kind == "p2p" else math.ceil(math.log2(groups[0]))
    sent_ratio = 1.0 if kind == "p2p" else (groups[0] - 1) / groups[0]
    return LinkLevel(
        name="host",
        size=num_ranks,
        latency_s=_rounded(line.latency_s / hops),
        bytes_per_s=_rounded(line.bytes_per_s * sent_ratio),
        source=source,
    )


def _line(samples: Sequence[Sample], kind: str, group: int) -> LinearCost:
    chosen = [sample for sample in samples if (sample.what, sample.group) == (kind, group)]
    line = fit_linear([sample.size for sample in chosen], [sample.seconds for sample in chosen])
    return LinearCost(_rounded(line.latency_s), _rounded(line.bytes_per_s))


def _rounded(value: float) -> float:
    """Four digits: more would be noise."""
    return float(f"{value:.3e}")
