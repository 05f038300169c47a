"""``compare``: what the ranks measured against the reference, as a verdict."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from shardstage.data import Microbatch
from shardstage.parity.diagnose import Symptoms, diagnose
from shardstage.parity.measure import PieceError, RankReport
from shardstage.parity.probe import Activations
from shardstage.parity.tolerance import Tolerances
from shardstage.parity.trajectory import Trajectory
from shardstage.parity.verdict import FirstFailure, Row, Verdict
from shardstage.training.folder import RunFolder
from shardstage.training.job import TrainJob

__all__ = ["Reference", "compare"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """What one process computed: a trajectory, signatures of the blocks' outputs in its first step, and what was read for each step."""

    trajectory: Trajectory
    activations: Activations
    tolerances: Tolerances
    batches: tuple[tuple[Microbatch, ...], ...]


@dataclass(frozen=True, kw_only=True)
class _TensorError:
    """L2 error of a whole tensor, and the ranks whose part of it is wrong."""

    error: float
    ranks: tuple[int, ...]


def compare(job: TrainJob, reference: Reference, reports: Sequence[RankReport]) -> Verdict:
    """The verdict on a job of which ``reports`` holds one for each rank, in order."""
    trajectory, tolerances = reference.trajectory, reference.tolerances
    gradients = _tensor_errors([r.gradients for r in reports], tolerances.gradients)
    parameters = _tensor_errors([r.parameters for r in reports], tolerances.parameters)
    activations = dict(_activation_errors(reference, reports))
    norms = [result.gradient_norm for result in reports[0].results]
    rows = [
        _scalar_row("loss", trajectory.losses, [r.loss for r in reports[0].results], tolerances.loss),
        *(
            [_scalar_row("gradient norm", trajectory.gradient_norms, found, tolerances.gradient_norm)]
            if len(found := [norm for norm in norms if norm is not None]) == len(norms)
            else []
        ),
        _tensor_row("gradient", gradients, tolerances.gradients, _sizes(trajectory.gradients)),
        _tensor_row("parameter", parameters, tolerances.parameters, _sizes(trajectory.parameters)),
    ]
    logged, is_log_equal = _against_log(RunFolder(path=Path(job.folder)), reports[0])
    verdict = Verdict(
        subject=_subject(job, trajectory.num_steps),
        rows=tuple(rows),
        derivation=tolerances.derivation,
        logged=logged,
        is_log_equal=is_log_equal,
    )
    if all(row.is_equal for row in rows):
        return verdict
    return _explained(verdict, job, reference, reports, activations, gradients, parameters)


def _explained(
    verdict: Verdict,
    job: TrainJob,
    reference: Reference,
    reports: Sequence[RankReport],
    activations: Mapping[str, _TensorError],
    gradients: Mapping[str, _TensorError],
    parameters: Mapping[str, _TensorError],
) -> Verdict:
    tolerances = reference.tolerances
    symptoms = Symptoms(
        job=job,
        reference=reference.trajectory,
        tolerances=tolerances,
        reports=reports,
        activation_ratios={n: _ratio(e.error, tolerances.activations[n]) for n, e in activations.items()},
        failed=tuple(n for n, e in gradients.items() if e.error > tolerances.gradients[n]),
        batches=reference.batches,
    )
    failure = (
        _first_forward(job, symptoms, activations)
        or _first_backward(job, gradients, tolerances.gradients, "gradient")
        or _first_backward(job, parameters, tolerances.parameters, "update")
        or FirstFailure(module="the loss", direction="forward", ranks=tuple(r.rank for r in reports))
    )
    return replace(verdict, failure=failure, cause=diagnose(symptoms))


def _subject(job: TrainJob, num_steps: int) -> str:
    plan = job.plan
    axes = ", ".join(
        f"{axis}={plan.mesh.size(axis)}" for axis in ("dp", "tp", "pp") if plan.mesh.size(axis) > 1
    )
    zero = f", zero={plan.zero}" if plan.zero else ""
    where = f"{axes}{zero}" if axes else "one rank"
    return f"{job.config.model} on {where} in {plan.precision}, {num_steps} steps, against one process in float64"


def _scalar_row(quantity: str, expected: Sequence[float], found: Sequence[float], tolerance: float) -> Row:
    errors = [abs(a - b) for a, b in zip(expected, found, strict=True)]
    worst = max(range(len(errors)), key=lambda step: (math.isnan(errors[step]), errors[step]))
    return Row(
        quantity=quantity,
        where=f"step {worst + 1} of {len(errors)}",
        error=errors[worst],
        tolerance=tolerance,
        reference=abs(expected[worst]),
        count=len(errors),
    )


def _tensor_row(
    quantity: str,
    errors: Mapping[str, _TensorError],
    tolerances: Mapping[str, float],
    sizes: Mapping[str, float],
) -> Row:
    worst = max(errors, key=lambda name: _ratio(errors[name].error, tolerances[name]))
    return Row(
        quantity=f"{quantity}s" if len(errors) > 1 else quantity,
        where=worst,
        error=errors[worst].error,
        tolerance=tolerances[worst],
        reference=sizes[worst],
        count=len(errors),
    )


def _sizes(tensors: Mapping[str, object]) -> dict[str, float]:
    return {name: float(tensor.norm()) for name, tensor in tensors.items()}  # type: ignore[attr-defined]


def _ratio(error: float, tolerance: float) -> float:
    if math.isnan(error):
        return math.inf
    return error / tolerance if tolerance else (math.inf if error else 0.0)


def _tensor_errors(
    by_rank: Sequence[Sequence[PieceError]], tolerances: Mapping[str, float]
) -> dict[str, _TensorError]:
    """Errors of whole tensors: of the replicas of a piece the worst counts, and pieces add up in squares.

    A rank is wrong if its piece errs by more than its share of what the tensor is allowed.
    """
    pieces: dict[str, dict[tuple[int, int, int], float]] = defaultdict(dict)
    numels: dict[str, dict[tuple[int, int, int], int]] = defaultdict(dict)
    held = [(rank, piece) for rank, found in enumerate(by_rank) for piece in found]
    for _, piece in held:
        worst = _larger(pieces[piece.fqn].get(piece.piece, 0.0), piece.error_square)
        pieces[piece.fqn][piece.piece] = worst
        numels[piece.fqn][piece.piece] = piece.numel
    found = {}
    for fqn in tolerances:
        total = sum(numels[fqn].values()) or 1
        ranks = tuple(
            rank
            for rank, piece in held
            if piece.fqn == fqn and not piece.error_square <= tolerances[fqn] ** 2 * piece.numel / total
        )
        found[fqn] = _TensorError(error=math.sqrt(sum(pieces[fqn].values())), ranks=ranks)
    return found


def _larger(a: float, b: float) -> float:
    """The larger one; what is no number is larger than all."""
    return b if math.isnan(b) or b > a else a


def _activation_errors(
    reference: Reference, reports: Sequence[RankReport]
) -> Iterator[tuple[str, _TensorError]]:
    """Largest error of a sample's signature, by value name in forward order; parts of a sample's activation are added up first."""
    for name, expected in reference.activations.items():
        allowed = reference.tolerances.activations[name]
        worst, wrong = 0.0, set[int]()
        for ranks, position, value in _whole_signatures(name, reports):
            error = abs(value - expected[position])
            worst = _larger(worst, error)
            if not error <= allowed:
                wrong.update(ranks)
        yield name, _TensorError(error=worst, ranks=tuple(sorted(wrong)))


def _whole_signatures(
    name: str, reports: Sequence[RankReport]
) -> Iterator[tuple[tuple[int, ...], int, float]]:
    """(ranks, position, signature) of every whole activation called ``name``."""
    parts: dict[tuple[int, int, int], list[tuple[int, float]]] = defaultdict(list)
    for report in reports:
        for position, (value, is_part) in report.activations.get(name, {}).items():
            if is_part:
                parts[report.pp, report.dp, position].append((report.rank, value))
            else:
                yield (report.rank,), position, value
    for (_, _, position), summands in parts.items():
        yield tuple(rank for rank, _ in summands), position, sum(value for _, value in summands)


def _first_forward(
    job: TrainJob, symptoms: Symptoms, activations: Mapping[str, _TensorError]
) -> FirstFailure | None:
    """The first block whose output is wrong."""
    for name, error in activations.items():
        if symptoms.activation_ratios[name] > 1:
            return FirstFailure(module=_module_of(job, name), direction="forward", ranks=error.ranks)
    return None


def _module_of(job: TrainJob, value: str) -> str:
    """The layer that makes a value, or the module within what is no layer."""
    index = job.graph.producer[value]
    block = next(b for b in job.graph.blocks if b.start <= index < b.stop)
    return block.module if block.is_layer and block.module else job.graph.ops[index].module or block.module


def _first_backward(
    job: TrainJob, errors: Mapping[str, _TensorError], tolerances: Mapping[str, float], direction: str
) -> FirstFailure | None:
    """The first module in backward order that has a wrong gradient or parameter."""
    uses = {p.fqn: max(job.graph.consumers[p.name], default=-1) for p in job.graph.parameters}
    wrong = [name for name, e in errors.items() if not e.error <= tolerances[name]]
    if not wrong:
        return None
    first = max(wrong, key=lambda name: uses[name])
    return FirstFailure(module=first, direction=direction, ranks=tuple(sorted(set(errors[first].ranks))))


def _against_log(folder: RunFolder, report: RankReport) -> tuple[str, bool]:
    """How the losses relate to those that the training run logged: it is the same program, so they must have the same bits."""
    logged: dict[int, float] = {}
    for entry in folder.log_lines():
        logged.setdefault(int(entry["step"]), float(entry["loss"]))
    both = [(step, r.loss, logged[step]) for step, r in enumerate(report.results) if step in logged]
    if not both:
        return "", True
    for step, here, there in both:
        if here != there:
            return f"step {step + 1} has loss {there!r} there and {here!r} here", False
    return f"{len(both)} losses equal, bit by bit", True
