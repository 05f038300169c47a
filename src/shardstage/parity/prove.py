"""``prove_job``: a job's first steps on its plan against the same steps on one process in float64."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file

from shardstage.errors import ConfigError
from shardstage.parity.compare import Reference, compare
from shardstage.parity.faults import Fault, broken_job, check_fault
from shardstage.parity.measure import REFERENCE_FILE, Request, measure_rank, read_reports
from shardstage.parity.probe import exact_replica, probing_replica
from shardstage.parity.reference import GlobalBatches, first_values, follow_reference, stored_tensors
from shardstage.parity.tolerance import derive_tolerances, num_probes
from shardstage.parity.verdict import Verdict
from shardstage.runtime.launch import launch
from shardstage.training.job import TrainJob

__all__ = ["MAX_STEPS", "prove_job", "run_reference", "write_reference"]

MAX_STEPS = 4
"""Steps that a proof follows: rounding errors grow with each, and with them the tolerance; a fault shows in the first."""


def prove_job(job: TrainJob, *, fault: Fault | None = None, reference: Reference | None = None) -> Verdict:
    """Starts ranks that run at most ``MAX_STEPS`` steps of ``job`` and compares them with ``reference`` (computed here if not given).

    ``fault`` is put into the ranks on purpose. Raises ConfigError where it would change nothing, or where there is no step to compare.
    """
    if fault is not None:
        check_fault(fault, job)
    reference = reference or run_reference(job)
    with _scratch_folder(Path(job.folder)) as folder:
        write_reference(reference, folder)
        num_steps = reference.trajectory.num_steps
        request = Request(folder=str(folder), num_steps=num_steps, fault=fault)
        launch(
            measure_rank,
            (job if fault is None else broken_job(fault, job), request),
            num_ranks=job.plan.mesh.world_size,
            log_dir=Path(job.folder) / "logs" / "prove",
        )
        reports = read_reports(folder)
    return compare(job, reference, reports)


def run_reference(job: TrainJob) -> Reference:
    """The job's first steps on one process in float64, and the tolerances that the probes give."""
    num_steps = min(job.config.steps, MAX_STEPS)
    if num_steps < 1:
        raise ConfigError("a run of no steps has nothing to compare", hint="--steps 4")
    batches = GlobalBatches(job)
    model = first_values(job)
    first = stored_tensors(model)
    trajectory = follow_reference(job, model, batches, num_steps=num_steps)
    if not all(map(math.isfinite, trajectory.losses)):
        raise ConfigError(
            f"the loss is {trajectory.losses[-1]} in float64 already: there is nothing to compare",
            hint="[optimizer] lr = 1e-4",
        )
    activations = exact_replica(job, first).activations(batches)
    replica = probing_replica(job, first)
    probes = (replica.probe(batches, num_steps=num_steps, seed=seed) for seed in range(num_probes(num_steps)))
    tolerances = derive_tolerances(
        trajectory,
        activations,
        first,
        probes,
        precision=job.plan.precision,
        gradient_dtype=job.plan.gradient_dtype,
    )
    return Reference(
        trajectory=trajectory,
        activations=activations,
        tolerances=tolerances,
        batches=tuple(batches.step(step) for step in range(num_steps)),
    )


def write_reference(reference: Reference, folder: Path) -> None:
    """Writes the gradients and parameters where the ranks read them piece by piece: no rank holds them all."""
    trajectory = reference.trajectory
    tensors = {f"gradient.{name}": tensor for name, tensor in trajectory.gradients.items()}
    tensors |= {f"parameter.{name}": tensor for name, tensor in trajectory.parameters.items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / REFERENCE_FILE)


@contextmanager
def _scratch_folder(parent: Path) -> Iterator[Path]:
    """A folder on the run's own storage for what may be large; gone afterwards."""
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="prove-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
