"""What there is to run on: devices, the links between them, and what both were measured to do.

In goes a preset's name, a TOML file or a measurement of this machine; out comes a frozen ``Cluster``. The package
refuses to know what will run on it: no model, plan or price of a step. Only ``probe.py`` imports torch, and nothing
here imports ``probe.py``.

    cluster = load("h100:512")                  a preset's name or a file's path, and optionally a number of devices
    cluster.num_devices, cluster.levels         levels are innermost first
    cluster.with_devices(64)                    the same machine, another number of its devices
    load("a100-40:8+h100:8")                    several classes of devices: presets or files joined by a network
    cluster.parts, cluster.is_mixed             (Part(name, device, num_devices, first_rank), …) in rank order
    cluster.part(1), cluster.part_of(rank)      a part as a Cluster of one class with ranks from 0; the index of a rank's
    cluster.device_at(rank)                     the rank's DeviceClass; cluster.device is the first part's
    cluster.level_for(8)                        innermost LinkLevel that joins ranks 0..7; or any sequence of ranks
    cluster.collective("all_reduce", 8)         → LinearCost(latency_s, bytes_per_s); or any sequence of ranks
    cluster.collective_strided("all_reduce", stride=8, count=1000)      ranks 0, 8, 16, …: in O(levels)
    cluster.collective(...).seconds(num_bytes)  latency_s + num_bytes / bytes_per_s
    cluster.device.memory_bytes                 of one device (of one rank, for a CPU)
    cluster.device.flops_per_s["bfloat16"]      best rate of a large matrix product
    cluster.device.gemm_efficiency(flops, dtype="bfloat16")     ratio of that rate that a product of so many FLOPs reaches
    cluster.device.gemm_s(flops, dtype=...)     seconds of one matrix product
    cluster.device.bytes_per_s                  reading plus writing of device memory
    cluster.device.op_latency_s                 what an op takes however small its tensors; 0 where unknown
    cluster.device.alone_ratio, .message        of ranks that share cores: how much quicker one is alone, what a message takes of them
    cluster.device.price_per_hour, cluster.price_per_hour       USD of one device, of all; None where unknown
    cluster.calibration, cluster.factors        what its own runs say about predictions: factors by cause, 1 where nothing is known
    cluster.notes                               what was assumed to make the cluster up
    cluster.to_toml(), Cluster.from_toml(text), save(cluster, path)     exact round trip
    shardstage.cluster.probe.probe(4)           → Cluster: this machine as measured; imports torch

``num_bytes`` of a collective is the whole tensor: what all_reduce reduces, what all_gather returns, what reduce_scatter
and all_to_all are given by each rank, what broadcast and p2p send.
"""

from __future__ import annotations

from shardstage.cluster.calibration import CAUSES, UNCALIBRATED, Calibration
from shardstage.cluster.cluster import Cluster, Part
from shardstage.cluster.device import DeviceClass, GemmCurve
from shardstage.cluster.files import join, load, more_devices, preset_names, save
from shardstage.cluster.host import HostShare
from shardstage.cluster.links import CollectiveCurve, CollectiveKind, LinearCost, LinkLevel

__all__ = [
    "CAUSES",
    "UNCALIBRATED",
    "Calibration",
    "Cluster",
    "CollectiveCurve",
    "CollectiveKind",
    "DeviceClass",
    "GemmCurve",
    "HostShare",
    "LinearCost",
    "LinkLevel",
    "Part",
    "join",
    "load",
    "more_devices",
    "preset_names",
    "save",
]
