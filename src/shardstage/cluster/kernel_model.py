"""``KernelModel``: how long kernels take on a GPU: matrix products by their tiles, attention, what only moves bytes, launches.

    product     [m, k] · [k, n], ``count`` times     tiles = ceil(m / tile_m) × ceil(n / tile_n) × count
                waves × 2 × tile_m × tile_n × k / (rate of one multiprocessor × what the tile reaches of it)
    attention   FLOPs (half of them where causal) / (rate × ratio)
    other       bytes / (bytes_per_s × moved_ratio)
    each        + launch_s on the device;  dispatch_s on the host, which runs ahead or holds the device up

A wave is one tile on every multiprocessor. The last wave may be nearly empty, which costs it whole; a kernel that cuts along k (split-K,
stream-K) spreads it. What cuBLAS does lies between: ``wave_ratio`` of the time is quantised. The fastest tile is taken.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from shardstage.cluster.table import Table
from shardstage.errors import ClusterError

__all__ = ["ALIGNED_BYTES", "KernelModel", "Tile"]

ALIGNED_BYTES = 16
"""Tensor cores load rows in such pieces (NVIDIA, "Matrix Multiplication Background User's Guide", tensor core requirements)."""


class Tile(NamedTuple):
    """``m`` × ``n`` elements of a product's output, either way round; ``ratio`` of a multiprocessor's rate is reached on it."""

    m: int
    n: int
    ratio: float


@dataclass(frozen=True, kw_only=True)
class KernelModel:
    """Ratios are of the device's ``flops_per_s`` and ``bytes_per_s``.

    ``sustained_ratio``: what products reach over hours, with all devices of a job under load, of what they reach in a benchmark.
    ``misaligned_ratio``: what is left of a product's rate where rows are no multiple of ``ALIGNED_BYTES``.
    ``overlap_slowdown``: seconds that products and other kernels lose for each second in which a collective runs beside them: the share of
    multiprocessors that it takes.
    ``dispatch_s``: what the host takes for one kernel of eager PyTorch, autograd and the framework's Python included.
    """

    num_sms: int
    wave_ratio: float
    tiles: tuple[Tile, ...] = field(hash=False)
    attention_forward_ratio: float
    attention_backward_ratio: float
    moved_ratio: float
    misaligned_ratio: float
    launch_s: float
    dispatch_s: float
    sustained_ratio: float
    overlap_slowdown: float
    source: str

    def __post_init__(self) -> None:
        ratios = {name: getattr(self, name) for name in _RATIOS} | {
            "tiles": min((tile.ratio for tile in self.tiles), default=0.0)
        }
        for name, ratio in ratios.items():
            if not 0 < ratio <= 1:
                raise ClusterError(
                    f"kernels: {name} must lie above 0 and at most at 1, not {ratio}", hint=f"{name} = 0.8"
                )
        if not 0 <= self.overlap_slowdown <= 1:
            raise ClusterError(
                f"kernels: overlap_slowdown must lie within 0 and 1, not {self.overlap_slowdown}",
                hint="overlap_slowdown = 0.15",
            )
        if self.num_sms < 1 or not 0 <= self.wave_ratio <= 1:
            raise ClusterError(
                f"kernels: num_sms must be at least 1 and wave_ratio within 0 and 1, not {self.num_sms} and {self.wave_ratio}",
                hint="num_sms = 108\nwave_ratio = 0.34",
            )

    def product_s(
        self, m: int, n: int, k: int, count: int, flops_per_s: float, *, row_bytes: int = 16
    ) -> float:
        """Seconds of ``count`` products under load, without the launch; ``flops_per_s`` is the device's best rate.

        ``row_bytes`` divides the length in bytes of all rows of the operands and of the result.
        """
        best = _least_area(self, m, n, count)
        ratio = self.sustained_ratio * (self.misaligned_ratio if row_bytes % ALIGNED_BYTES else 1.0)
        return best * 2.0 * k * self.num_sms / (flops_per_s * ratio)

    def products_s(self, m: Any, n: Any, k: Any, count: Any, flops_per_s: Any, is_aligned: Any) -> Any:
        """``product_s`` of arrays of sizes."""
        best: Any = np.inf
        for tile in self.tiles:
            for tile_m, tile_n in {(tile.m, tile.n), (tile.n, tile.m)}:
                waves = np.ceil(m / tile_m) * np.ceil(n / tile_n) * count / self.num_sms
                quantised = self.wave_ratio * np.ceil(waves) + (1.0 - self.wave_ratio) * np.maximum(
                    waves, 1.0
                )
                best = np.minimum(best, quantised * tile_m * tile_n / tile.ratio)
        ratio = self.sustained_ratio * np.where(is_aligned, 1.0, self.misaligned_ratio)
        return best * 2.0 * k * self.num_sms / (flops_per_s * ratio)

    def to_table(self) -> dict[str, Any]:
        numbers = {name: getattr(self, name) for name in ("num_sms", "wave_ratio", *_RATIOS, *_OTHERS)}
        return {**numbers, "tiles": [list(tile) for tile in self.tiles], "source": self.source}

    @staticmethod
    def from_table(table: Table) -> KernelModel:
        model = KernelModel(
            num_sms=table.integer("num_sms"),
            wave_ratio=table.number("wave_ratio"),
            tiles=tuple(Tile(int(m), int(n), ratio) for m, n, ratio in table.rows("tiles", width=3)),
            source=table.text("source"),
            **{name: table.number(name) for name in (*_RATIOS, *_OTHERS)},
        )
        table.done()
        return model


_RATIOS = (
    "attention_forward_ratio",
    "attention_backward_ratio",
    "moved_ratio",
    "misaligned_ratio",
    "sustained_ratio",
)
_OTHERS = ("overlap_slowdown", "launch_s", "dispatch_s")


@lru_cache(maxsize=65536)
def _least_area(model: KernelModel, m: int, n: int, count: int) -> float:
    """Waves × elements of a tile / its ratio, for the best tile: what to multiply by the seconds of one element."""
    best = math.inf
    for tile in model.tiles:
        for tile_m, tile_n in ((tile.m, tile.n), (tile.n, tile.m)):
            waves = -(-m // tile_m) * -(-n // tile_n) * count / model.num_sms
            quantised = model.wave_ratio * math.ceil(waves) + (1.0 - model.wave_ratio) * max(waves, 1.0)
            best = min(best, quantised * tile_m * tile_n / tile.ratio)
    return best
