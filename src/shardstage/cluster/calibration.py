"""``Calibration``: by how much the formulas miss on one cluster, by cause, as its own runs tell."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from shardstage.cluster.table import Table
from shardstage.errors import ClusterError

__all__ = ["CAUSES", "TENTH_PERCENTILE", "UNCALIBRATED", "Calibration", "quadratic"]

CAUSES: Final = ("products", "memory", "host", "tp", "dp", "pp")
"""What a step's seconds go to: matrix products, kernels bound by memory, what launching adds to both, and what waits for an axis."""

UNCALIBRATED: Final[Mapping[str, float]] = MappingProxyType(dict.fromkeys(CAUSES, 1.0))
"""The factors of a cluster whose runs nobody looked at."""

TENTH_PERCENTILE: Final = 1.2815515655446004
"""Of a normal distribution, in standard deviations: a tenth lies further below the mean, a tenth further above."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Measured over modelled seconds by cause, fitted from ``num_runs`` runs on devices of ``device_kind``.

    ``spread`` is the standard deviation of log(measured / predicted) of a run that the factors were not fitted from. ``covariance``
    is that of the logarithms of the factors, in the order of ``CAUSES``; ``known_variance`` is what it makes of the runs' own
    predictions, on average, which ``spread`` holds already. ``cluster`` and ``date`` say where and when (YYYY-MM-DD).
    """

    factors: Mapping[str, float] = field(hash=False)
    covariance: tuple[tuple[float, ...], ...]
    known_variance: float
    spread: float
    num_runs: int
    device_kind: str
    cluster: str
    date: str

    def __post_init__(self) -> None:
        if set(self.factors) != set(CAUSES) or any(not factor > 0 for factor in self.factors.values()):
            raise ClusterError(
                f"a calibration needs a factor above zero for each of {', '.join(CAUSES)}, not {dict(self.factors)}",
                hint="\n".join(("[calibration.factors]", *(f"{cause} = 1.0" for cause in CAUSES))),
            )
        if len(self.covariance) != len(CAUSES):
            raise ClusterError(
                f"the covariance of a calibration has {len(CAUSES)} rows, not {len(self.covariance)}",
                hint="shardstage calibrate RUN --cluster cluster.toml",
            )

    def seconds(self, parts: Mapping[str, float]) -> float:
        """Expected seconds of a step whose modelled seconds go to these causes."""
        return sum(self.factors[cause] * modelled_s for cause, modelled_s in parts.items())

    def range_s(self, parts: Mapping[str, float]) -> tuple[float, float, float]:
        """10th percentile, expected and 90th percentile; wide for a step of causes that the runs had little of."""
        expected_s = self.seconds(parts)
        shares = [self.factors[cause] * parts.get(cause, 0.0) / expected_s for cause in CAUSES]
        unknown = max(0.0, quadratic(self.covariance, shares) - self.known_variance)
        reach = math.exp(TENTH_PERCENTILE * math.sqrt(self.spread**2 + unknown))
        return expected_s / reach, expected_s, expected_s * reach

    def interval(self, cause: str) -> tuple[float, float]:
        """10th and 90th percentile of a factor."""
        place = CAUSES.index(cause)
        reach = math.exp(TENTH_PERCENTILE * math.sqrt(self.covariance[place][place]))
        return self.factors[cause] / reach, self.factors[cause] * reach

    def to_table(self) -> dict[str, Any]:
        return {
            "num_runs": self.num_runs,
            "device_kind": self.device_kind,
            "cluster": self.cluster,
            "date": self.date,
            "spread": self.spread,
            "known_variance": self.known_variance,
            "covariance": self.covariance,
            "factors": {cause: self.factors[cause] for cause in CAUSES},
        }

    @staticmethod
    def from_table(table: Table) -> Calibration:
        factors = table.table("factors")
        calibration = Calibration(
            factors=factors.remaining_numbers(),
            covariance=table.rows("covariance", width=len(CAUSES)),
            known_variance=table.number("known_variance"),
            spread=table.number("spread"),
            num_runs=table.integer("num_runs"),
            device_kind=table.text("device_kind"),
            cluster=table.text("cluster"),
            date=table.text("date"),
        )
        table.done()
        return calibration


def quadratic(matrix: Iterable[Iterable[float]], vector: Iterable[float]) -> float:
    """vᵀ M v."""
    v = list(vector)
    return sum(
        row_entry * sum(m * x for m, x in zip(row, v, strict=True))
        for row_entry, row in zip(v, matrix, strict=True)
    )
