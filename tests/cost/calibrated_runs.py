"""Runs of a machine whose true factors are known."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping

from shardstage.cluster import CAUSES
from shardstage.cost.calibrate import Observation

TRUE = {"products": 1.3, "memory": 0.9, "host": 1.5, "tp": 1.8, "dp": 0.7, "pp": 1.1}


def parts(**seconds: float) -> dict[str, float]:
    return dict.fromkeys(CAUSES, 0.0) | seconds


def observed(
    seconds: Mapping[str, float], ratio: float, *, name: str = "run", kind: str = "cuda"
) -> Observation:
    return Observation(
        name=name, parts=dict(seconds), measured_s=ratio * sum(seconds.values()), device_kind=kind
    )


def random_runs(
    count: int, *, noise: float = 0.0, true: Mapping[str, float] = TRUE, seed: int = 0
) -> list[Observation]:
    """Runs whose steps go to all causes in random shares, and take ``true`` times the modelled seconds but for a random ``noise``."""
    draws = random.Random(seed)
    runs = []
    for number in range(count):
        seconds = {cause: draws.gammavariate(2.0, 1.0) for cause in CAUSES}
        exact_s = sum(true[cause] * seconds[cause] for cause in CAUSES)
        measured_s = exact_s * math.exp(noise * draws.gauss(0.0, 1.0))
        runs.append(
            Observation(name=f"run{number}", parts=seconds, measured_s=measured_s, device_kind="cuda")
        )
    return runs
