"""``diagnose``: the probable cause of a failed proof, from the pattern of its errors and from what the ranks saw."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from shardstage.data import Microbatch
from shardstage.parity.measure import PieceError, RankReport
from shardstage.parity.tolerance import Tolerances
from shardstage.parity.trajectory import Trajectory
from shardstage.parity.verdict import Cause
from shardstage.sharding.rules import is_random
from shardstage.training.job import TrainJob

__all__ = ["Symptoms", "diagnose"]

# Roundoffs that are taken for a dtype's: sums round at float32 all the same, so a coarse run errs less than in proportion.
_COARSE = (("bfloat16", 2.0**-13, 2.0**-5), ("float16 or TF32", 2.0**-16, 2.0**-13))


@dataclass(frozen=True, kw_only=True)
class Symptoms:
    """What is known of a failed proof.

    ``errors`` are the largest errors of activations (relative to allowed) by value name; ``failed`` the parameters whose first
    gradient is wrong; ``batches`` the global batches of the reference, by step.
    """

    job: TrainJob
    reference: Trajectory
    tolerances: Tolerances
    reports: Sequence[RankReport]
    activation_ratios: Mapping[str, float]
    failed: tuple[str, ...]
    batches: Sequence[Sequence[Microbatch]]

    @property
    def is_forward_equal(self) -> bool:
        """Whether all activations of the first step agree."""
        return all(ratio <= 1 for ratio in self.activation_ratios.values())

    @property
    def is_first_loss_equal(self) -> bool:
        error = abs(self.reports[0].results[0].loss - self.reference.losses[0])
        return error <= self.tolerances.loss


def diagnose(symptoms: Symptoms) -> Cause | None:
    """The first cause that the evidence supports, surest evidence first; None where no pattern is known."""
    found = (rule(symptoms) for rule in _RULES)
    return next((cause for cause in found if cause is not None), None)


def _wrong_samples(symptoms: Symptoms) -> Cause | None:
    """Samples are named, so no pattern is needed."""
    for step, batches in enumerate(symptoms.batches):
        expected = {p: s for b in batches for p, s in zip(b.positions, b.sample_ids, strict=True)}
        for report in symptoms.reports:
            wrong = [p for p, sample in report.samples[step].items() if expected.get(p) != sample]
            if wrong:
                read = report.samples[step][wrong[0]]
                return Cause(
                    name="wrong data order",
                    evidence=f"in step {step} rank {report.rank} read sample {read} at position {wrong[0]} of the global "
                    f"batch, where sample {expected.get(wrong[0])} belongs ({len(wrong)} of {len(report.samples[step])} are wrong)",
                )
    return None


def _wrong_seed(symptoms: Symptoms) -> Cause | None:
    if not any(map(is_random, symptoms.job.graph.ops)) or symptoms.is_forward_equal:
        return None
    for report in symptoms.reports:
        seed = next((s for s in report.seeds if s != symptoms.job.config.seed), None)
        if seed is not None:
            return Cause(
                name="wrong RNG",
                evidence=f"rank {report.rank} draws its dropout masks from seed {seed}, and the run's seed is "
                f"{symptoms.job.config.seed}: one sample's masks then depend on the rank",
            )
    return None


def _counted_loss(symptoms: Symptoms) -> Cause | None:
    """All gradients are k times too large, and nothing else is wrong with them."""
    if not symptoms.is_forward_equal:
        return None
    factors = _factors([p for report in symptoms.reports for p in report.gradients])
    if not factors or any(residual > 0.02 for _, residual in factors):
        return None
    k = median(factor for factor, _ in factors)
    if abs(k - 1) < 0.02 or any(abs(factor / k - 1) > 0.02 for factor, _ in factors):
        return None
    loss_ratio = symptoms.reports[0].results[0].loss / symptoms.reference.losses[0]
    also = (
        f"and so is the loss ({loss_ratio:.3g} times)"
        if abs(loss_ratio / k - 1) < 0.02
        else "the loss is not"
    )
    name = "doubled loss" if abs(k - 2) < 0.02 else "scaled loss"
    return Cause(
        name=name,
        evidence=f"the loss is counted {k:.3g} times: every gradient is {k:.3g} times the reference's, {also}",
    )


def _lost_tie(symptoms: Symptoms) -> Cause | None:
    """Only parameters with several uses are wrong."""
    tied = {p.fqn: p.ties for p in symptoms.job.graph.parameters}
    uses = {p.fqn: len(symptoms.job.graph.consumers[p.name]) for p in symptoms.job.graph.parameters}
    failed = symptoms.failed
    if not failed or not symptoms.is_forward_equal or any(uses[fqn] < 2 and not tied[fqn] for fqn in failed):
        return None
    stages: dict[int, float] = {}
    for report in symptoms.reports:
        square = sum(p.error_square for p in report.gradients if p.fqn == failed[0])
        size = sum(p.reference_square for p in report.gradients if p.fqn == failed[0])
        if size:
            stages[report.pp] = max(stages.get(report.pp, 0.0), math.sqrt(square / size))
    parts = ", ".join(f"stage {stage} is off by {error:.0%}" for stage, error in sorted(stages.items()))
    names = " = ".join((failed[0], *tied[failed[0]]))
    return Cause(
        name="lost tie",
        evidence=f"only {names}, which is used {uses[failed[0]]} times, has a wrong gradient ({parts}): "
        "the parts of its uses are not added up",
    )


def _missing_dp_reduction(symptoms: Symptoms) -> Cause | None:
    """The dp ranks' gradients differ and add up to the reference's."""
    dp = symptoms.job.plan.mesh.dp
    if dp < 2 or not symptoms.failed or not symptoms.is_first_loss_equal:
        return None
    factors = [factor for factor, _ in _factors([p for r in symptoms.reports for p in r.gradients])]
    if not factors:
        return None
    mean = sum(factors) / len(factors)
    differing = _differing(symptoms.reports, lambda report: (report.pp, report.tp))
    if abs(mean * dp - 1) > 0.3:
        return None
    replicas = (
        f"{len(differing)} tensors differ between dp ranks, which must hold equal bits, and "
        if differing
        else ""
    )
    return Cause(
        name="missing reduction over dp",
        evidence=f"{replicas}along the reference's gradients the ranks have {mean:.2f} of them on average, about 1/dp = "
        f"{1 / dp:.2f}: each rank keeps the gradient of its own samples",
    )


def _missing_tp_reduction(symptoms: Symptoms) -> Cause | None:
    """What every tp rank should hold whole differs between them."""
    tp = symptoms.job.plan.mesh.tp
    if tp < 2:
        return None
    for name, (low, high) in _spread_over_tp(symptoms).items():
        if symptoms.activation_ratios.get(name, 0.0) > 1:
            return Cause(
                name="missing reduction over tp",
                evidence=f"the tp ranks of one stage hold different values of {name}, which they should hold whole "
                f"(signatures {low:.4g} and {high:.4g}): partial sums were not added up",
            )
    differing = _differing(symptoms.reports, lambda report: (report.pp, report.dp))
    if symptoms.is_forward_equal and differing:
        return Cause(
            name="missing reduction over tp",
            evidence=f"the forward is right, and the gradients of {len(differing)} replicated parameters differ between "
            f"tp ranks, first {differing[0]}: partial gradients were not added up",
        )
    return None


def _coarser_dtype(symptoms: Symptoms) -> Cause | None:
    """Errors are proportional to the roundoff: what the probes make of u, a run makes of its own."""
    derivation = symptoms.tolerances.derivation
    ratios = [ratio for ratio in symptoms.activation_ratios.values() if ratio > 0]
    if not ratios or median(ratios) <= 1:
        return None
    measured = median(ratios) * derivation.confidence * derivation.unit_roundoff
    for dtype, low, high in _COARSE:
        if low < measured < high and derivation.precision != dtype:
            return Cause(
                name=f"dtype: computed in {dtype}",
                evidence=f"activations err everywhere as if the unit roundoff were {measured:.1e}; that of "
                f"{derivation.precision} is {derivation.unit_roundoff:.1e}",
            )
    return None


def _unknown_masks(symptoms: Symptoms) -> Cause | None:
    if symptoms.is_forward_equal or not any(map(is_random, symptoms.job.graph.ops)):
        return None
    return Cause(
        name="wrong RNG",
        evidence="the model drops out, samples and seeds are right, and activations differ from the first dropout on: "
        "masks may depend on the rank",
    )


def _wrong_capture(symptoms: Symptoms) -> Cause | None:
    if not symptoms.is_forward_equal or symptoms.is_first_loss_equal:
        return None
    return Cause(
        name="capture",
        evidence="the run computes what the captured graph says, and the model itself has another loss: the graph is not "
        "the model",
    )


_RULES: tuple[Callable[[Symptoms], Cause | None], ...] = (
    _wrong_samples,
    _wrong_seed,
    _counted_loss,
    _coarser_dtype,
    _missing_tp_reduction,
    _lost_tie,
    _missing_dp_reduction,
    _unknown_masks,
    _wrong_capture,
)


def _factors(pieces: Sequence[PieceError]) -> list[tuple[float, float]]:
    """For each piece the factor k that brings the reference closest to it, and the relative size of what remains."""
    return list(_fits(pieces))


def _fits(pieces: Sequence[PieceError]) -> Iterator[tuple[float, float]]:
    typical = median(p.reference_square / p.numel for p in pieces if p.numel) if pieces else 0.0
    for p in pieces:
        if p.numel and p.reference_square / p.numel > 1e-6 * typical > 0:
            k = p.product / p.reference_square
            remainder = max(0.0, p.measured_square - k * p.product)
            yield k, math.sqrt(remainder / max(p.measured_square, 1e-300))


def _differing(
    reports: Sequence[RankReport], peers: Callable[[RankReport], tuple[int, int]]
) -> tuple[str, ...]:
    """Parameters of which two ranks with the same ``peers`` hold the same piece in different bits."""
    held: dict[object, set[str]] = defaultdict(set)
    for report in reports:
        for piece in report.gradients:
            held[(peers(report), piece.fqn, piece.piece)].add(piece.digest)
    return tuple(dict.fromkeys(key[1] for key, digests in held.items() if len(digests) > 1))  # type: ignore[index]


def _spread_over_tp(symptoms: Symptoms) -> dict[str, tuple[float, float]]:
    """Whole activations whose signatures differ between tp ranks: smallest and largest, of the sample that shows it most."""
    held: dict[tuple[str, int], list[float]] = defaultdict(list)
    for report in symptoms.reports:
        for name, by_position in report.activations.items():
            for position, (value, is_part) in by_position.items():
                if not is_part:
                    held[(name, position)].append(value)
    found: dict[str, tuple[float, float]] = {}
    for (name, _), values in held.items():
        low, high = min(values), max(values)
        if high - low > symptoms.tolerances.activations.get(name, math.inf):
            before = found.get(name, (0.0, 0.0))
            found[name] = max((before, (low, high)), key=lambda pair: pair[1] - pair[0])
    return found
