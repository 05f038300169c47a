"""Fits the line of a collective or a copy to its measurements."""

from __future__ import annotations

from collections.abc import Sequence

from shardstage.cluster.links import LinearCost
from shardstage.errors import ClusterError

__all__ = ["fit_linear"]


def fit_linear(num_bytes: Sequence[float], seconds: Sequence[float]) -> LinearCost:
    """The line ``latency_s + num_bytes / bytes_per_s`` with the least sum of squared *relative* errors.

    Relative, because sizes span five orders of magnitude and a plain fit would see only the largest. The minimum over
    latency_s >= 0 and bytes_per_s > 0: with w = 1/seconds², the normal equations are solved in closed form, and where a
    constraint is active the line is refitted with that coefficient at its bound.
    """
    if len(num_bytes) != len(seconds) or len(set(num_bytes)) < 2 or min(seconds) <= 0:
        raise ClusterError(
            f"a line needs two sizes and positive times, not {list(num_bytes)} and {list(seconds)}",
            hint="measure at least two sizes",
        )
    weights = [1 / time**2 for time in seconds]
    sum_w = sum(weights)
    sum_x = sum(w * x for w, x in zip(weights, num_bytes, strict=True))
    sum_xx = sum(w * x * x for w, x in zip(weights, num_bytes, strict=True))
    sum_t = sum(w * t for w, t in zip(weights, seconds, strict=True))
    sum_xt = sum(w * x * t for w, x, t in zip(weights, num_bytes, seconds, strict=True))
    determinant = sum_w * sum_xx - sum_x**2
    latency_s = (sum_xx * sum_t - sum_x * sum_xt) / determinant
    seconds_per_byte = (sum_w * sum_xt - sum_x * sum_t) / determinant
    if latency_s < 0:
        return LinearCost(0.0, sum_xx / sum_xt)
    if (
        seconds_per_byte <= 0
    ):  # time does not grow with size: noise; the largest size bounds the rate from below
        return LinearCost(sum_t / sum_w, max(num_bytes) / min(seconds))
    return LinearCost(latency_s, 1 / seconds_per_byte)
