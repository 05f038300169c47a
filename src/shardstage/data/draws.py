"""Random numbers that depend on named integers alone.

Only the raw stream of PCG64 is used: NumPy keeps it bit for bit between versions, while the methods of
``Generator`` (``permutation``, ``choice``) may change (NEP 19). A run resumed later sees the same order.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def draw(count: int, *key: int) -> npt.NDArray[np.uint64]:
    """``count`` uniform 64-bit integers for these non-negative integers; the same on every machine."""
    return np.asarray(np.random.PCG64(np.random.SeedSequence(key)).random_raw(count), dtype=np.uint64)


def permutation(count: int, *key: int) -> npt.NDArray[np.int64]:
    """A uniform permutation of ``range(count)``; O(count log count)."""
    return np.argsort(draw(count, *key), kind="stable").astype(np.int64, copy=False)
