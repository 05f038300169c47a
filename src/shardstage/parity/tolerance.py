"""``derive_tolerances``: how far from the reference a correct run may be, and why."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median

from torch import Tensor

from shardstage.parity.probe import Activations, Probe
from shardstage.parity.rounding import ACCUMULATION_ROUNDOFF, UNIT_ROUNDOFF
from shardstage.parity.trajectory import Trajectory

__all__ = ["CONFIDENCE", "Derivation", "Tolerances", "derive_tolerances", "num_probes"]

CONFIDENCE = 8.0
"""λ: a correct run may err by this many times the root mean square of the probes.

A factor of 2 is for what a plan adds to one device's roundings: a sum that is split over ranks and microbatches is rounded once more at
each of these two levels. What is left, 4 standard deviations, is for chance: an error is the sum of very many small and independent
ones, so it is close to normal. Beyond 4 deviations lies one such error in 16,000, and one in 250 where the deviation itself is known
from 8 samples only (Student's t), as that of a loss is; the norm of a whole tensor varies less.
"""

_MIN_FREEDOM = 8


def num_probes(num_steps: int) -> int:
    """Probes needed so that every pooled figure rests on at least 8 samples, and any on two."""
    return max(2, math.ceil(_MIN_FREEDOM / max(1, num_steps)))


@dataclass(frozen=True, kw_only=True)
class Derivation:
    """The numbers that the tolerances follow from.

    ``relative`` is the typical disturbance of each kind of quantity in the probes: root mean square for losses and norms,
    median over tensors for the others (a parameter's relative to how far it moved).
    """

    precision: str
    unit_roundoff: float
    num_ops: int
    longest_sum: int
    num_probes: int
    num_steps: int
    relative: Mapping[str, float]
    gradient_dtype: str | None = None
    confidence: float = CONFIDENCE

    def text(self) -> str:
        """The derivation with its numbers, lines of at most 80 columns."""
        u, n = self.unit_roundoff, self.longest_sum
        v = min(u, ACCUMULATION_ROUNDOFF)
        loss, gradient = self.relative["loss"], self.relative["gradient"]
        lines = [
            f"u = {u:.2g}: the roundoff of {self.precision}, by which each result errs once;",
            f"v·√n = {v * math.sqrt(n):.2g}: what sums of up to n = {n} terms add (v = {v:.2g})",
            "  (probabilistic bound, Higham & Mary 2019, 2020);",
            f"{self.num_ops} results a microbatch, disturbed so at random in {self.num_probes} probes of "
            f"{self.num_steps} steps",
            "  (Monte Carlo arithmetic): depth and condition of this model make of u",
            f"  {loss:.1e} in the loss ({loss / u:.1f} u), {gradient:.1e} in a gradient ({gradient / u:.0f} u);",
            *self._sums(),
            f"tolerance = λ × root mean square of the probes, λ = {self.confidence:g}: 2 for the sums that",
            "  a plan splits over ranks and microbatches, times 4 standard deviations.",
        ]
        return "\n".join(lines)

    def _sums(self) -> list[str]:
        if self.gradient_dtype != "bfloat16":
            return []
        return [f"sums of gradients are rounded to {self.gradient_dtype} with every microbatch;"]


@dataclass(frozen=True, kw_only=True)
class Tolerances:
    """Largest errors of a correct run: absolute for losses and norms, L2 norms for whole tensors by name.

    ``activations``: of the signature of one sample, by value name.
    """

    loss: float
    gradient_norm: float
    gradients: Mapping[str, float]
    parameters: Mapping[str, float]
    activations: Mapping[str, float]
    derivation: Derivation


@dataclass(kw_only=True)
class _Squares:
    """Sums of squared disturbances."""

    loss: float = 0.0
    gradient_norm: float = 0.0
    gradients: dict[str, float] = field(default_factory=dict)
    parameters: dict[str, float] = field(default_factory=dict)
    activations: dict[str, float] = field(default_factory=dict)
    num_probes: int = 0
    num_ops: int = 0
    longest_sum: int = 1


def derive_tolerances(
    reference: Trajectory,
    activations: Activations,
    first: Mapping[str, Tensor],
    probes: Iterable[Probe],
    *,
    precision: str,
    gradient_dtype: str | None = None,
) -> Tolerances:
    """Tolerances from probes, of which one is held at a time.

    A tensor is never taken to be steadier than the median tensor of its kind: its few elements may have been lucky in the probes. The norm
    of all gradients errs by at most the norm of their errors, and does where these are biased, as sums are that lose small terms.
    ``first`` holds the parameters before the first step.
    """
    sums = _Squares()
    for probe in probes:
        _add(sums, reference, activations, probe)
    count, steps = sums.num_probes, reference.num_steps
    loss = math.sqrt(sums.loss / (count * steps))
    gradient_norm = math.sqrt(sums.gradient_norm / (count * steps))
    sizes = {name: float(gradient.norm()) for name, gradient in reference.gradients.items()}
    moves = {name: float((value - first[name]).norm()) for name, value in reference.parameters.items()}
    gradients, typical_gradient = _steadied(_means(sums.gradients, count), sizes)
    whole_gradient = math.sqrt(sum(error**2 for error in gradients.values()))
    parameters, typical_move = _steadied(_means(sums.parameters, count), moves)
    derivation = Derivation(
        precision=precision,
        unit_roundoff=UNIT_ROUNDOFF[precision],
        num_ops=sums.num_ops,
        longest_sum=sums.longest_sum,
        gradient_dtype=gradient_dtype,
        num_probes=count,
        num_steps=steps,
        relative={
            "loss": loss / abs(reference.losses[0] or 1.0),
            "gradient_norm": gradient_norm / (reference.gradient_norms[0] or 1.0),
            "gradient": typical_gradient,
            "parameter": typical_move,
        },
    )
    return Tolerances(
        loss=CONFIDENCE * loss,
        gradient_norm=CONFIDENCE * max(gradient_norm, whole_gradient),
        gradients=_scaled(gradients),
        parameters=_scaled(parameters),
        activations=_scaled(_means(sums.activations, count)),
        derivation=derivation,
    )


def _add(sums: _Squares, reference: Trajectory, activations: Activations, probe: Probe) -> None:
    found = probe.trajectory
    sums.num_probes += 1
    sums.num_ops, sums.longest_sum = probe.num_ops, max(sums.longest_sum, probe.longest_sum)
    sums.loss += _square_distance(reference.losses, found.losses)
    sums.gradient_norm += _square_distance(reference.gradient_norms, found.gradient_norms)
    for kind, theirs, mine in (
        (sums.gradients, found.gradients, reference.gradients),
        (sums.parameters, found.parameters, reference.parameters),
    ):
        for name, tensor in mine.items():
            kind[name] = kind.get(name, 0.0) + float((theirs[name] - tensor).square().sum())
    for name, by_position in activations.items():
        square = _square_distance(by_position.values(), (probe.activations[name][p] for p in by_position))
        sums.activations[name] = sums.activations.get(name, 0.0) + square / len(by_position)


def _square_distance(a: Iterable[float], b: Iterable[float]) -> float:
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def _means(squares: Mapping[str, float], count: int) -> dict[str, float]:
    return {name: math.sqrt(square / count) for name, square in squares.items()}


def _steadied(errors: Mapping[str, float], sizes: Mapping[str, float]) -> tuple[dict[str, float], float]:
    """Errors, none smaller relative to its size than the median; and that median."""
    ratios = [errors[name] / size for name, size in sizes.items() if size > 0]
    typical = median(ratios) if ratios else 0.0
    return {name: max(error, typical * sizes[name]) for name, error in errors.items()}, typical


def _scaled(errors: Mapping[str, float]) -> dict[str, float]:
    return {name: CONFIDENCE * error for name, error in errors.items()}
