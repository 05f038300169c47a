"""``RandomSamples``: tensors drawn at random, in given shapes: for a proof or a timing, which need no real data."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch

from shardstage.data.draws import draw
from shardstage.data.source import SampleSource

__all__ = ["RandomSamples", "TensorSpec"]

NUM_SAMPLES = 1 << 16


class TensorSpec(NamedTuple):
    """A tensor of one sample, without batch dim: integers are below ``high``, floats normal."""

    shape: tuple[int, ...]
    dtype: str
    high: int


class RandomSamples(SampleSource):
    """Samples whose tensors depend on (seed, index, name) alone."""

    def __init__(self, specs: Mapping[str, TensorSpec], *, seed: int) -> None:
        self._specs = dict(specs)
        self._seed = seed

    @property
    def num_samples(self) -> int:
        return NUM_SAMPLES

    @property
    def fingerprint(self) -> str:
        """Digest of the shapes and the seed."""
        return hashlib.sha256(repr((sorted(self._specs.items()), self._seed)).encode()).hexdigest()[:32]

    def sample(self, index: int) -> dict[str, torch.Tensor]:
        """Return sample ``index``. Raises IndexError outside ``range(num_samples)``."""
        if not 0 <= index < NUM_SAMPLES:
            raise IndexError(f"sample {index} of {NUM_SAMPLES}")
        return {
            name: _drawn(spec, self._seed, index, number)
            for number, (name, spec) in enumerate(sorted(self._specs.items()))
        }


def _drawn(spec: TensorSpec, *key: int) -> torch.Tensor:
    count = int(np.prod(spec.shape, dtype=np.int64))
    dtype: torch.dtype = getattr(torch, spec.dtype)
    if not dtype.is_floating_point:
        numbers = (draw(count, *key) % np.uint64(spec.high)).astype(np.int64)
        return torch.from_numpy(numbers).reshape(spec.shape).to(dtype)
    # Box and Muller, 1958: two uniform numbers make a normal one.
    uniforms = (draw(2 * count, *key) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    radius = np.sqrt(-2 * np.log1p(-uniforms[:count]))
    return torch.from_numpy(radius * np.cos(2 * np.pi * uniforms[count:])).reshape(spec.shape).to(dtype)
