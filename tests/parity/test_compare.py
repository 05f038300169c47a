"""Reports of ranks that nobody ran: what is compared, who is blamed, and for what."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.parity.models import job_of

from shardstage.graph import ModelGraph
from shardstage.graph.capture import capture
from shardstage.parity.compare import Reference, compare
from shardstage.parity.measure import PieceError, RankReport
from shardstage.parity.probe import block_outputs
from shardstage.parity.reference import GlobalBatches
from shardstage.parity.tolerance import Derivation, Tolerances
from shardstage.parity.trajectory import Trajectory
from shardstage.parity.verdict import Verdict
from shardstage.runtime.engine import StepResult
from shardstage.training.job import TrainJob, source_of

ALLOWED = 1e-6
LOSSES = (5.0, 4.0)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> ModelGraph:
    config = job_of("decoder", tmp_path_factory.mktemp("run")).config
    return capture(source_of(config), sequence=16)


@pytest.fixture
def job(graph: ModelGraph, tmp_path: Path) -> TrainJob:
    return job_of("decoder", tmp_path, plan="dp=2", ranks=2, graph=graph)


def reference_of(job: TrainJob) -> Reference:
    names = [p.fqn for p in job.graph.parameters]
    ones = {name: torch.full((4,), 0.5, dtype=torch.float64) for name in names}
    values = block_outputs(job.graph)
    batches = GlobalBatches(job)
    derivation = Derivation(
        precision="float32",
        unit_roundoff=2.0**-24,
        num_ops=1,
        longest_sum=1,
        num_probes=2,
        num_steps=2,
        relative={"loss": 1e-7, "gradient": 1e-7},
    )
    return Reference(
        trajectory=Trajectory(losses=LOSSES, gradient_norms=(1.0, 1.0), gradients=ones, parameters=ones),
        activations={name: dict.fromkeys(range(4), 1.0) for name in values},
        tolerances=Tolerances(
            loss=ALLOWED,
            gradient_norm=ALLOWED,
            gradients=dict.fromkeys(names, ALLOWED),
            parameters=dict.fromkeys(names, ALLOWED),
            activations=dict.fromkeys(values, ALLOWED),
            derivation=derivation,
        ),
        batches=(batches.step(0), batches.step(1)),
    )


def piece(fqn: str, factor: float = 1.0, remainder: float = 0.0, bits: str = "same") -> PieceError:
    """A piece that is ``factor`` times the reference, of norm 1, and something of norm ``remainder`` at right angles to it."""
    return PieceError(
        fqn=fqn,
        piece=(0, 0, 4),
        numel=4,
        error_square=(factor - 1) ** 2 + remainder**2,
        reference_square=1.0,
        measured_square=factor**2 + remainder**2,
        product=factor,
        digest=bits,
    )


def reports_of(
    job: TrainJob,
    *,
    gradient: Callable[[int, str], PieceError] = lambda rank, fqn: piece(fqn),
    activation: Callable[[int, str], float] = lambda rank, name: 1.0,
    losses: Sequence[float] = LOSSES,
) -> list[RankReport]:
    """Reports of a correct run, but for what is given."""
    mesh = job.plan.mesh
    reports = []
    for rank in range(mesh.world_size):
        dp, tp = mesh.coordinate(rank, "dp"), mesh.coordinate(rank, "tp")
        held = range(dp * 4 // mesh.dp, (dp + 1) * 4 // mesh.dp)
        samples = [
            {p: s for b in GlobalBatches(job).step(n) for p, s in zip(b.positions, b.sample_ids, strict=True)}
            for n in range(2)
        ]
        report = RankReport(rank=rank, pp=mesh.coordinate(rank, "pp"), dp=dp, tp=tp)
        report.results = [
            StepResult(loss=loss, gradient_norm=1.0, num_targets=60, learning_rate=1e-3) for loss in losses
        ]
        names = [p.fqn for p in job.graph.parameters]
        report.gradients = [gradient(rank, name) for name in names]
        report.parameters = [piece(name) for name in names]
        report.activations = {
            n: {p: (activation(rank, n), False) for p in held} for n in block_outputs(job.graph)
        }
        report.samples = [{p: by_position[p] for p in held} for by_position in samples]
        report.seeds = [job.config.seed] * 2
        reports.append(report)
    return reports


def judged(job: TrainJob, reports: Sequence[RankReport]) -> Verdict:
    return compare(job, reference_of(job), reports)


def cause_of(verdict: Verdict) -> str:
    assert verdict.cause is not None, verdict.text()
    return verdict.cause.name


def test_a_correct_run_is_equal(job: TrainJob) -> None:
    verdict = judged(job, reports_of(job))
    assert verdict.is_equal and verdict.cause is None and verdict.failure is None
    assert [row.quantity for row in verdict.rows] == ["loss", "gradient norm", "gradients", "parameters"]
    assert verdict.subject == (
        f"{job.config.model} on dp=2 in float32, 2 steps, against one process in float64"
    )


def test_errors_of_pieces_add_up_and_of_replicas_the_worst_counts(job: TrainJob) -> None:
    first = job.graph.parameters[0].fqn

    def halves(rank: int, fqn: str) -> PieceError:
        if fqn != first:
            return piece(fqn)
        half = replace(piece(fqn), piece=(0, 2 * rank, 2 * rank + 2), numel=2)
        return replace(half, error_square=[9e-18, 16e-18][rank])

    row = judged(job, reports_of(job, gradient=halves)).rows[2]
    assert (row.where, row.error) == (first, pytest.approx(5e-9))
    replicas = reports_of(
        job, gradient=lambda rank, fqn: replace(piece(fqn), error_square=[9e-18, 16e-18][rank])
    )
    assert judged(job, replicas).rows[2].error == pytest.approx(4e-9)


def test_the_first_wrong_gradient_in_backward_order_and_its_rank_are_named(job: TrainJob) -> None:
    broken = {"layers.0.up.weight", "layers.1.qkv.weight"}
    reports = reports_of(
        job, gradient=lambda rank, fqn: piece(fqn, remainder=1.0 if rank == 1 and fqn in broken else 0.0)
    )
    failure = judged(job, reports).failure
    assert failure is not None
    assert (failure.module, failure.direction, failure.ranks) == ("layers.1.qkv.weight", "gradient", (1,))


def test_the_first_wrong_activation_in_forward_order_is_named(job: TrainJob) -> None:
    made = block_outputs(job.graph)
    reports = reports_of(job, activation=lambda rank, n: 1.0 + (rank == 0 and n in made[1:]))
    failure = judged(job, [*reports_with_loss(reports, 6.0)]).failure
    assert failure is not None
    assert (failure.module, failure.direction, failure.ranks) == ("layers.0", "forward", (0,))


def reports_with_loss(reports: Sequence[RankReport], loss: float) -> Sequence[RankReport]:
    for report in reports:
        report.results[0] = replace(report.results[0], loss=loss)
    return reports


def test_a_loss_that_is_no_number_is_not_equal(job: TrainJob) -> None:
    assert not judged(job, reports_of(job, losses=(5.0, float("nan")))).is_equal


def test_losses_are_held_against_those_of_the_training_run_bit_by_bit(job: TrainJob) -> None:
    log = Path(job.folder) / "log.jsonl"

    def logged(*losses: float) -> Verdict:
        lines = (json.dumps({"step": step, "loss": loss}) for step, loss in enumerate(losses))
        log.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return judged(job, reports_of(job))

    assert logged(5.0, 4.0, 3.0).logged == "2 losses equal, bit by bit"
    other = logged(5.0, 4.0000000000000009)
    assert not other.is_equal
    assert other.logged == "step 2 has loss 4.000000000000001 there and 4.0 here"


def test_counting_the_loss_three_times_is_named(job: TrainJob) -> None:
    verdict = judged(job, reports_of(job, gradient=lambda rank, fqn: piece(fqn, factor=3.0)))
    assert cause_of(verdict) == "scaled loss"
    assert "3 times the reference's, the loss is not" in verdict.text().replace("\n            ", " ")


def test_ranks_that_keep_their_own_samples_gradients_are_named(job: TrainJob) -> None:
    own = reports_of(job, gradient=lambda rank, fqn: piece(fqn, 0.5, 0.4, bits=f"rank {rank}"))
    assert cause_of(judged(job, own)) == "missing reduction over dp"


def test_a_tie_is_lost_where_only_a_tied_parameter_is_wrong(job: TrainJob) -> None:
    tied = reports_of(
        job,
        gradient=lambda rank, fqn: piece(
            fqn, 0.6 if fqn == "embedding.weight" else 1.0, 0.3 * (fqn == "embedding.weight")
        ),
    )
    verdict = judged(job, tied)
    assert cause_of(verdict) == "lost tie"
    assert "embedding.weight = head.weight, which is used 2 times" in " ".join(verdict.text().split())


def test_wrong_samples_are_named_before_any_pattern(job: TrainJob) -> None:
    reports = reports_of(job, gradient=lambda rank, fqn: piece(fqn, 0.5, 0.4, bits=f"rank {rank}"))
    reports[1].samples[0] = {p: s + 1 for p, s in reports[1].samples[0].items()}
    verdict = judged(job, reports)
    assert cause_of(verdict) == "wrong data order"
    assert "in step 0 rank 1 read sample" in " ".join(verdict.text().split())


def test_masks_of_another_seed_are_named(job: TrainJob) -> None:
    reports = reports_of(job, activation=lambda rank, name: 1.0 + rank)
    reports[1].seeds = [17, 17]
    verdict = judged(job, reports_with_loss(reports, 5.5))  # type: ignore[arg-type]
    assert cause_of(verdict) == "wrong RNG" and "seed 17" in verdict.text()


def test_masks_are_suspected_where_seeds_are_right_and_nothing_else_fits(job: TrainJob) -> None:
    reports = reports_with_loss(reports_of(job, activation=lambda rank, name: 1.0 + rank), 5.5)
    assert cause_of(judged(job, reports)) == "wrong RNG"


@pytest.mark.parametrize(
    ("roundoff", "dtype"), [(2.0**-9, "bfloat16"), (2.0**-14, "float16 or TF32")]
)  # fmt: skip
def test_a_coarser_dtype_is_known_by_the_size_of_its_errors(
    job: TrainJob, roundoff: float, dtype: str
) -> None:
    error = ALLOWED / 8 * roundoff / 2.0**-24
    reports = reports_of(
        job,
        activation=lambda rank, name: 1.0 + error,
        gradient=lambda rank, fqn: piece(fqn, remainder=0.01),
    )
    assert cause_of(judged(job, reports)) == f"dtype: computed in {dtype}"


def test_a_graph_that_is_not_the_model_is_told_from_a_wrong_run(job: TrainJob) -> None:
    assert cause_of(judged(job, reports_of(job, losses=(5.1, 4.1)))) == "capture"


@pytest.fixture
def tp_job(graph: ModelGraph, tmp_path: Path) -> TrainJob:
    return job_of("decoder", tmp_path, plan="tp=2", ranks=2, graph=graph)


def test_partial_sums_that_were_not_added_show_as_replicas_that_differ(tp_job: TrainJob) -> None:
    forward = reports_of(tp_job, activation=lambda rank, name: 1.0 + rank)
    assert cause_of(judged(tp_job, reports_with_loss(forward, 5.5))) == "missing reduction over tp"
    backward = reports_of(
        tp_job, gradient=lambda rank, fqn: piece(fqn, 0.5, 0.4, bits=f"{rank}" if "norm" in fqn else "same")
    )
    assert cause_of(judged(tp_job, backward)) == "missing reduction over tp"


def test_the_parts_of_a_split_activation_are_added_up(tp_job: TrainJob) -> None:
    reports = reports_of(tp_job)
    parts: Mapping[int, float] = {0: 0.25, 1: 0.75}
    for report in reports:
        for by_position in report.activations.values():
            by_position.update(dict.fromkeys(by_position, (parts[report.rank], True)))
    assert judged(tp_job, reports).is_equal
    verdict = judged(tp_job, reports_with_loss(reports, 5.5))
    assert verdict.failure is not None and verdict.failure.module == "the loss"
