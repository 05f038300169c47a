"""``calibrate``: the factors by which the formulas miss on one cluster, from its own runs.

    log measured_r = log Σ_c f_c P_rc + ε_r          P_rc modelled seconds of run r that go to cause c
    log f_c ~ N(0, τ²),  ε_r ~ N(0, σ²)              f_c factors, six at most; both independent

The factors are the most probable ones: least squares of the logarithms with a ridge (σ / τ)² towards factors of 1, by Gauss and Newton.
A run moves a factor by the share that its cause has of the run, a cause that no run has keeps 1.

Both variances come from the runs (MacKay, "Bayesian Interpolation", Neural Computation 4, 1992, §4), with γ the number of factors that
the runs determine. The built-in spread σ₀ of predictions, which is over runs of many clusters, counts as six factors and six runs, as
many as there are factors to be found: a single run cannot tell whether it or its cluster is odd.

τ² = (6 σ₀² + Σ log² f_c) / (6 + γ)           before any run τ = σ₀: a step of two equal causes has half of σ₀² by its factors,
σ² = (6 σ₀² / 2 + Σ ε_r²) / (6 + n - γ)       and the other half of its own

Factors may not leave [0.5, 2] before there are two runs for each.

The spread of a prediction is that of runs which the factors were not fitted from: each is predicted by the runs of other parts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import lsq_linear

from shardstage.cluster import CAUSES, Calibration, Cluster
from shardstage.cluster.calibration import TENTH_PERCENTILE
from shardstage.cost.step import CALIBRATIONS
from shardstage.errors import ClusterError

__all__ = ["Observation", "calibrate", "predicted_by_others"]

MANY_RUNS: Final = 2 * len(CAUSES)
"""From here on factors may leave [0.5, 2]."""

LONGEST_STEP: Final = 0.5
"""Of a log factor in a round: further away the linear model says little."""

MAX_ROUNDS: Final = 100
CONVERGED: Final = 1e-7
"""Change of a log factor."""

SETTLED: Final = 1e-4
"""Relative change of τ² and σ²."""

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Observation:
    """A run on devices of ``device_kind``: seconds of a step by cause (``Prediction.parts`` without a calibration), and as measured."""

    name: str
    parts: Mapping[str, float] = field(hash=False)
    measured_s: float
    device_kind: str

    @property
    def modelled_s(self) -> float:
        """The step before calibration."""
        return sum(self.parts.values())


class _Variances(NamedTuple):
    """τ² and σ²."""

    factor: float
    run: float


class _Fit(NamedTuple):
    """Logarithms of the factors, their covariance, and how each run's log seconds follow them: [runs, causes]."""

    logs: Vector
    covariance: Vector
    slopes: Vector


def calibrate(observations: Sequence[Observation], cluster: Cluster, *, date: str) -> Calibration:
    """Factors of ``cluster`` from its runs. Raises ClusterError without runs, or where one was on devices of another kind."""
    _check(observations, cluster)
    fit = _fit(observations, _built_in_spread(cluster), is_bounded=len(observations) < MANY_RUNS)
    misses = [
        math.log(seen.measured_s / predicted_s)
        for seen, predicted_s in zip(observations, predicted_by_others(observations, cluster), strict=True)
    ]
    squares = _built_in_spread(cluster) ** 2 + sum(miss**2 for miss in misses)
    known = np.einsum("rc,cd,rd->r", fit.slopes, fit.covariance, fit.slopes)
    return Calibration(
        factors=_factors(fit),
        covariance=tuple(tuple(round(float(entry), 9) + 0.0 for entry in row) for row in fit.covariance),
        known_variance=float(known.mean()),
        spread=math.sqrt(squares / (1 + len(misses))),
        num_runs=len(observations),
        device_kind=cluster.device.kind,
        cluster=cluster.name,
        date=date,
    )


def predicted_by_others(observations: Sequence[Observation], cluster: Cluster) -> tuple[float, ...]:
    """Seconds of each run by factors fitted from those runs whose parts are not the same; by the formulas alone where there is none."""
    _check(observations, cluster)
    spread, is_bounded, predicted_s = _built_in_spread(cluster), len(observations) < MANY_RUNS, []
    for seen in observations:
        others = [other for other in observations if other.parts != seen.parts]
        factors = dict.fromkeys(CAUSES, 1.0)
        if others:
            factors = _factors(_fit(others, spread, is_bounded=is_bounded))
        predicted_s.append(sum(factors[cause] * modelled_s for cause, modelled_s in seen.parts.items()))
    return tuple(predicted_s)


def _check(observations: Sequence[Observation], cluster: Cluster) -> None:
    if not observations:
        raise ClusterError("there is no run to calibrate from", hint="shardstage calibrate runs/*")
    kinds = sorted({part.device.kind for part in cluster.parts})
    if len(kinds) > 1:
        raise ClusterError(
            f"cluster {cluster.name!r} has devices of kind {' and '.join(kinds)}, and one set of factors is no correction for both",
            hint="\n".join(
                (
                    f"shardstage calibrate RUN --cluster {cluster.parts[0].name}:{cluster.parts[0].num_devices} --out first.toml",
                    f"shardstage plan --cluster first.toml+{cluster.parts[1].name}:{cluster.parts[1].num_devices}",
                )
            ),
        )
    for seen in observations:
        if seen.device_kind != cluster.device.kind:
            raise ClusterError(
                f"the run {seen.name} was on {seen.device_kind}, and cluster {cluster.name!r} has devices of kind "
                f"{cluster.device.kind}",
                hint=f"leave out {seen.name}, or --cluster with the file of the machine that it ran on",
            )
        if not (seen.measured_s > 0 and seen.modelled_s > 0 and min(seen.parts.values()) >= 0):
            raise ClusterError(
                f"the run {seen.name} has a step of {seen.measured_s} s, modelled {dict(seen.parts)}: both must be above zero",
                hint=f"leave out {seen.name}",
            )


def _built_in_spread(cluster: Cluster) -> float:
    """σ₀: standard deviation of log(measured / predicted) of predictions on devices of this kind."""
    known = CALIBRATIONS.get(cluster.device.kind, CALIBRATIONS["cpu"])
    return math.log(known.high / known.low) / (2 * TENTH_PERCENTILE)


def _factors(fit: _Fit) -> dict[str, float]:
    return {cause: round(math.exp(log), 9) for cause, log in zip(CAUSES, fit.logs, strict=True)}


def _fit(observations: Sequence[Observation], built_in_spread: float, *, is_bounded: bool) -> _Fit:
    """The most probable factors, and τ and σ together with them; those of factors without bounds, so that these do not pass for noise."""
    modelled = np.array([[seen.parts.get(cause, 0.0) for cause in CAUSES] for seen in observations])
    measured = np.log([seen.measured_s for seen in observations])
    logs, known = np.zeros(len(CAUSES)), len(CAUSES)
    variances = start = _Variances(built_in_spread**2, built_in_spread**2 / 2)
    for _ in range(MAX_ROUNDS):
        logs = _most_probable(modelled, measured, logs, variances)
        slopes, residuals = _linear(modelled, measured, logs)
        determined = float(np.trace(_covariance(slopes, variances) @ slopes.T @ slopes)) / variances.run
        before = variances
        variances = _Variances(
            factor=(known * start.factor + float(logs @ logs)) / (known + determined),
            run=(known * start.run + float(residuals @ residuals)) / (known + len(residuals) - determined),
        )
        if np.allclose(variances, before, rtol=SETTLED, atol=0):
            break
    if is_bounded and np.abs(logs).max() > math.log(2):
        logs = _bounded(modelled, measured, variances)
    slopes, _ = _linear(modelled, measured, logs)
    return _Fit(logs, _covariance(slopes, variances), slopes)


def _most_probable(modelled: Vector, measured: Vector, logs: Vector, variances: _Variances) -> Vector:
    """The most probable log factors without bounds, from a guess."""
    for _ in range(MAX_ROUNDS):
        slopes, residuals = _linear(modelled, measured, logs)
        uphill = slopes.T @ residuals / variances.run - logs / variances.factor
        change = np.clip(_covariance(slopes, variances) @ uphill, -LONGEST_STEP, LONGEST_STEP)
        logs = logs + change
        if np.abs(change).max() < CONVERGED:
            break
    return logs


def _bounded(modelled: Vector, measured: Vector, variances: _Variances) -> Vector:
    """The most probable factors within [0.5, 2]."""
    logs, reach = np.zeros(len(CAUSES)), math.log(2)
    factor, noise = math.sqrt(variances.factor), math.sqrt(variances.run)
    for _ in range(MAX_ROUNDS):
        slopes, residuals = _linear(modelled, measured, logs)
        rows = np.vstack((slopes / noise, np.eye(len(logs)) / factor))
        wanted = np.concatenate((residuals / noise, -logs / factor))
        least, most = -reach - logs - CONVERGED, reach - logs + CONVERGED  # the solver wants some room
        change = lsq_linear(rows, wanted, bounds=(least, most)).x
        logs = logs + change
        if np.abs(change).max() < CONVERGED:
            break
    return np.asarray(logs.clip(-reach, reach))


def _linear(modelled: Vector, measured: Vector, logs: Vector) -> tuple[Vector, Vector]:
    """How log predicted seconds follow log factors, which is by the shares of the causes, and what is missing to the measured ones."""
    seconds = modelled * np.exp(logs)  # [runs, causes]
    predicted = seconds.sum(axis=1)
    return seconds / predicted[:, None], measured - np.log(predicted)


def _covariance(slopes: Vector, variances: _Variances) -> Vector:
    precision = slopes.T @ slopes / variances.run + np.eye(slopes.shape[1]) / variances.factor
    return np.asarray(np.linalg.inv(precision), dtype=np.float64)
