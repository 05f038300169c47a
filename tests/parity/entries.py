"""What the ranks of these tests run: many proofs in one start, for a start is dear."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from shardstage.parity.compare import Reference, compare
from shardstage.parity.faults import Fault, broken_job
from shardstage.parity.measure import Request, measure_joined, read_reports
from shardstage.parity.prove import write_reference
from shardstage.parity.verdict import Verdict
from shardstage.runtime.environment import RankEnvironment
from shardstage.runtime.launch import launch
from shardstage.training.job import TrainJob
from shardstage.training.rank import join_job

__all__ = ["Case", "prove_all"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A job, its reference, and what is to be broken in the ranks."""

    job: TrainJob
    reference: Reference
    fault: Fault | None = None


def prove_all(cases: Mapping[str, Case], folder: Path, *, num_ranks: int) -> dict[str, Verdict]:
    """The verdict of each case by name, all measured by the same ranks."""
    calls = []
    for name, case in cases.items():
        place = folder / name
        place.mkdir(parents=True)
        write_reference(case.reference, place)
        request = Request(folder=str(place), num_steps=case.reference.trajectory.num_steps, fault=case.fault)
        calls.append((case.job if case.fault is None else broken_job(case.fault, case.job), request))
    launch(_measure_all, (tuple(calls),), num_ranks=num_ranks, log_dir=folder / "logs")
    return {
        name: compare(case.job, case.reference, read_reports(folder / name)) for name, case in cases.items()
    }


def _measure_all(environment: RankEnvironment, calls: tuple[tuple[TrainJob, Request], ...]) -> None:
    device = join_job(environment, calls[0][0].config)
    for job, request in calls:
        measure_joined(environment, job, request, device)
