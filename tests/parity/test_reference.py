"""One process in float64, and the graph beside it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.parity.models import SEQUENCE, job_of

from shardstage.errors import ConfigError
from shardstage.graph import Op
from shardstage.parity.probe import block_outputs, exact_replica, probing_replica
from shardstage.parity.reference import GlobalBatches, first_values, follow_reference, stored_tensors
from shardstage.parity.rounding import UNIT_ROUNDOFF, Rounding
from shardstage.parity.tolerance import derive_tolerances
from shardstage.training.job import TrainJob


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    return job_of("decoder", tmp_path_factory.mktemp("run"), plan="dp=1,mb=3")


def first(job: TrainJob) -> dict[str, torch.Tensor]:
    return stored_tensors(first_values(job))


def test_the_global_batch_is_the_same_however_it_is_shared(job: TrainJob, tmp_path: Path) -> None:
    split = job_of("decoder", tmp_path, plan="dp=3", ranks=3, graph=job.graph)
    assert [len(batch.positions) for batch in GlobalBatches(job).step(1)] == [2, 2]
    assert len(GlobalBatches(split).step(1)) >= 3
    samples = [
        {p: s for b in GlobalBatches(j).step(1) for p, s in zip(b.positions, b.sample_ids, strict=True)}
        for j in (job, split)
    ]
    assert samples[0] == samples[1] and sorted(samples[0]) == [0, 1, 2, 3]


@pytest.mark.parametrize("model", ["decoder", "encoder", "bert"])
def test_the_model_and_its_graph_agree_to_float64(model: str, job: TrainJob, tmp_path: Path) -> None:
    """Losses and all gradients, with dropout, ties and casts to float32: the capture is the model."""
    job = job if model == "decoder" else job_of(model, tmp_path)
    batches = GlobalBatches(job)
    expected = follow_reference(job, first_values(job), batches, num_steps=1)
    values = first(job)
    parameters = {p.fqn: values[p.fqn].double() for p in job.graph.parameters}
    found = exact_replica(job, values).gradients(parameters, 0, batches.step(0), {}, Rounding({}, seed=0))
    assert found.loss == pytest.approx(expected.losses[0], rel=1e-13)
    assert set(found.gradients) == set(expected.gradients)
    for name, gradient in expected.gradients.items():
        assert (found.gradients[name] - gradient).norm() <= 1e-12 * gradient.norm() + 1e-17, name


def test_the_reference_does_not_depend_on_microbatches(job: TrainJob) -> None:
    whole = replace(job, plan=replace(job.plan, microbatch=4))
    one, other = (follow_reference(j, first_values(j), GlobalBatches(j), num_steps=2) for j in (job, whole))
    assert one.losses == pytest.approx(other.losses, rel=1e-12)
    for name, value in one.parameters.items():
        torch.testing.assert_close(value, other.parameters[name], rtol=1e-9, atol=1e-9)


def test_a_model_that_draws_other_random_numbers_is_refused(job: TrainJob) -> None:
    noise = Op(name="noise", target="aten.rand_like.default", source="model.py:3: torch.rand_like(x)")
    noisy = replace(job, graph=replace(job.graph, ops=(*job.graph.ops, noise)))
    with pytest.raises(ConfigError, match=r"model.py:3: torch.rand_like"):
        follow_reference(noisy, first_values(noisy), GlobalBatches(noisy), num_steps=1)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float64"])
def test_probes_stray_in_proportion_to_the_roundoff(job: TrainJob, precision: str, tmp_path: Path) -> None:
    own = job if precision == "float32" else job_of("decoder", tmp_path, precision=precision)
    batches, values = GlobalBatches(own), first(own)
    reference = follow_reference(own, first_values(own), batches, num_steps=1)
    activations = exact_replica(own, values).activations(batches)
    replica = probing_replica(own, values)
    probes = [replica.probe(batches, num_steps=1, seed=seed) for seed in range(2)]
    found = derive_tolerances(reference, activations, values, probes, precision=precision)
    u = UNIT_ROUNDOFF[precision]
    if precision == "float64":  # the decoder's own casts to float32 stay what they are
        u = UNIT_ROUNDOFF["float32"]
    assert 0.5 * u < found.derivation.relative["gradient"] < 100 * u
    assert set(found.gradients) == set(reference.gradients)
    assert set(found.activations) == set(block_outputs(own.graph)) != set()
    assert len(activations[next(iter(activations))]) == 4
    assert probes[0].longest_sum >= SEQUENCE and probes[0].num_ops > 100


def test_the_tolerance_admits_one_device_in_the_runs_precision(job: TrainJob) -> None:
    """The model as it is, in float32, is the plainest correct run: it uses up some of the tolerance, and not all."""
    batches, values = GlobalBatches(job), first(job)
    reference = follow_reference(job, first_values(job), batches, num_steps=1)
    replica = probing_replica(job, values)
    probes = [replica.probe(batches, num_steps=1, seed=seed) for seed in range(2)]
    found = derive_tolerances(reference, {}, values, probes, precision="float32")
    parameters = {p.fqn: values[p.fqn].double() for p in job.graph.parameters}
    own = type(replica)(job, values, {})  # nothing stands in for float32
    measured = own.gradients(parameters, 0, batches.step(0), {}, Rounding({}, seed=0))
    ratios = [
        float((measured.gradients[n] - g).norm()) / found.gradients[n] for n, g in reference.gradients.items()
    ]
    assert max(ratios) < 0.5
    assert max(ratios) > 0.005
    assert abs(measured.loss - reference.losses[0]) < found.loss
