"""One kind of device: how much it holds, how fast it multiplies, how fast it reads."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from shardstage.cluster.host import HostShare
from shardstage.cluster.kernel_model import KernelModel
from shardstage.cluster.links import LinearCost
from shardstage.cluster.table import Table
from shardstage.errors import ClusterError

__all__ = ["DeviceClass", "GemmCurve"]


@dataclass(frozen=True, kw_only=True)
class GemmCurve:
    """What a matrix product of a given size reaches: ``points`` are (flops, flops_per_s), by rising flops."""

    dtype: str
    points: tuple[tuple[float, float], ...]
    source: str

    def __post_init__(self) -> None:
        sizes = [flops for flops, _ in self.points]
        if not sizes or sizes != sorted(set(sizes)) or min(map(min, self.points)) <= 0:
            raise ClusterError(
                f"the GEMM curve of {self.dtype} must have positive points of rising size, not {self.points}",
                hint="points = [[1e9, 2e11], [1e10, 5e11]]",
            )

    def flops_per_s(self, flops: float) -> float:
        """A power law between neighbouring points: rate = a × flops^b.

        Below the first point its law goes on, with 0 <= b <= 1: a smaller product is neither faster nor slower in
        seconds. Above the last point the rate stays.
        """
        sizes = [size for size, _ in self.points]
        above = bisect.bisect_left(sizes, flops)
        if above == len(sizes) or len(sizes) == 1:
            return self.points[-1][1]
        (low, low_rate), (high, high_rate) = self.points[max(above, 1) - 1 : max(above, 1) + 1]
        exponent = math.log(high_rate / low_rate) / math.log(high / low)
        if above == 0:
            exponent = min(max(exponent, 0.0), 1.0)
        return low_rate * math.pow(flops / low, exponent)


@dataclass(frozen=True, kw_only=True)
class DeviceClass:
    """One kind of device; every number says its source.

    ``flops_per_s`` is the best rate of a large matrix product by dtype, dense; ``bytes_per_s`` counts reading plus
    writing of device memory; ``op_latency_s`` is what an op takes however small its tensors (0 where unknown). ``kind``
    is torch's device type. For a CPU, the device is one rank's share of it while all ranks compute, and ``alone_ratio``
    says how many times quicker a rank computes while the others wait and leave it their cores (1 where each rank has a
    device of its own). ``message`` is what sending or receiving a message takes of those cores: seconds of a rank while
    all ranks compute (None where talk is not theirs to do, or unknown). ``kernels`` prices single kernels by their shape
    where a model of them is known; the ``gemm`` curves serve elsewhere. ``price_per_hour`` is USD for one device,
    ``host`` what it has of its host's memory, where that is known and another one than its own. ``compute_capability`` is
    CUDA's, such as 7.0, by which torch chooses kernels (None: 8.0 or more).
    """

    name: str
    kind: str
    memory_bytes: int
    bytes_per_s: float
    flops_per_s: Mapping[str, float] = field(hash=False)
    source: str
    flops_source: str
    gemm: tuple[GemmCurve, ...] = ()
    op_latency_s: float = 0.0
    alone_ratio: float = 1.0
    message: LinearCost | None = None
    kernels: KernelModel | None = None
    price_per_hour: float | None = None
    price_source: str = ""
    host: HostShare | None = None
    compute_capability: float | None = None

    @property
    def has_bfloat16(self) -> bool:
        """Whether its tensor cores multiply bfloat16: CUDA's do from compute capability 8.0."""
        return self.kind == "cuda" and (self.compute_capability is None or self.compute_capability >= 8)

    def __post_init__(self) -> None:
        rates = {"memory_bytes": self.memory_bytes, "bytes_per_s": self.bytes_per_s, **self.flops_per_s}
        if self.price_per_hour is not None:
            rates["price_per_hour"] = self.price_per_hour
        if self.compute_capability is not None:
            rates["compute_capability"] = self.compute_capability
        if self.alone_ratio < 1:
            raise ClusterError(
                f"device {self.name!r}: a rank alone is no slower than one among others, and alone_ratio is {self.alone_ratio}",
                hint="alone_ratio = 1.0",
            )
        if self.message is not None and not (self.message.latency_s >= 0 and self.message.bytes_per_s > 0):
            raise ClusterError(
                f"device {self.name!r}: a message needs latency_s >= 0 and bytes_per_s > 0, not {tuple(self.message)}",
                hint="[device.message]\nlatency_s = 1e-3\nbytes_per_s = 1e9",
            )
        for name, value in rates.items():
            if not value > 0:
                raise ClusterError(
                    f"device {self.name!r}: {name} must be above zero, not {value}", hint=f"{name} = 1e12"
                )
        if not self.flops_per_s:
            raise ClusterError(
                f"device {self.name!r} has no flops_per_s", hint="[device.flops_per_s]\nfloat32 = 1e12"
            )

    def gemm_efficiency(self, flops: float, *, dtype: str | None = None) -> float:
        """The ratio of ``flops_per_s[dtype]`` that one matrix product of ``flops`` reaches.

        Without a curve of ``dtype`` the first curve's shape serves; without any curve the ratio is 1.
        """
        curve = self._curve(dtype)
        if curve is None or flops <= 0:
            return 1.0
        return curve.flops_per_s(flops) / self.rate(curve.dtype)

    def gemm_s(self, flops: float, *, dtype: str) -> float:
        """Seconds of one matrix product of ``flops``."""
        return flops / (self.rate(dtype) * self.gemm_efficiency(flops, dtype=dtype)) if flops > 0 else 0.0

    def rate(self, dtype: str) -> float:
        """``flops_per_s[dtype]``; ClusterError for a dtype that the device has no figure for."""
        if dtype not in self.flops_per_s:
            raise ClusterError(
                f"device {self.name!r} has no flops_per_s for {dtype}",
                hint=f"known: {', '.join(self.flops_per_s)}; or add `{dtype} = …` under [device.flops_per_s]",
            )
        return self.flops_per_s[dtype]

    def to_table(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": self.kind,
            "memory_bytes": self.memory_bytes,
            "bytes_per_s": self.bytes_per_s,
            **({"op_latency_s": self.op_latency_s} if self.op_latency_s else {}),
            **({"alone_ratio": self.alone_ratio} if self.alone_ratio > 1 else {}),
            **({} if self.compute_capability is None else {"compute_capability": self.compute_capability}),
            "source": self.source,
            **self._price(),
            "flops_per_s": {"source": self.flops_source, **self.flops_per_s},
            **({} if self.message is None else {"message": self.message.to_table()}),
            **({} if self.host is None else {"host": self.host.to_table()}),
            **({} if self.kernels is None else {"kernels": self.kernels.to_table()}),
            "gemm": [
                {"dtype": each.dtype, "source": each.source, "points": each.points} for each in self.gemm
            ],
        }

    @staticmethod
    def from_table(table: Table) -> DeviceClass:
        rates = table.table("flops_per_s")
        flops_source = rates.text("source")
        price = table.number("price_per_hour") if table.has("price_per_hour") else None
        device = DeviceClass(
            name=table.text("name"),
            kind=table.text("kind"),
            memory_bytes=table.integer("memory_bytes"),
            bytes_per_s=table.number("bytes_per_s"),
            op_latency_s=table.number("op_latency_s", default=0.0),
            alone_ratio=table.number("alone_ratio", default=1.0),
            compute_capability=table.number("compute_capability")
            if table.has("compute_capability")
            else None,
            source=table.text("source"),
            flops_source=flops_source,
            flops_per_s=rates.remaining_numbers(),
            gemm=tuple(_curve_from(entry) for entry in table.tables("gemm")),
            message=LinearCost.from_table(table.table("message")) if table.has("message") else None,
            kernels=KernelModel.from_table(table.table("kernels")) if table.has("kernels") else None,
            host=HostShare.from_table(table.table("host")) if table.has("host") else None,
            price_per_hour=price,
            price_source="" if price is None else table.text("price_source"),
        )
        table.done()
        return device

    def _price(self) -> dict[str, Any]:
        if self.price_per_hour is None:
            return {}
        return {"price_per_hour": self.price_per_hour, "price_source": self.price_source}

    def _curve(self, dtype: str | None) -> GemmCurve | None:
        exact = (curve for curve in self.gemm if curve.dtype == dtype)
        return next(exact, self.gemm[0] if self.gemm else None)


def _curve_from(table: Table) -> GemmCurve:
    curve = GemmCurve(dtype=table.text("dtype"), source=table.text("source"), points=table.points("points"))
    table.done()
    return curve
