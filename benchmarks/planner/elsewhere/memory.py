"""Holds predicted memory against nanotron's runs of ``runs.toml``: the most bytes allocated on the first pipeline rank.

Usage: python benchmarks/planner/elsewhere/memory.py
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "memory"))

from cases import Case, peak_bytes
from megatron import megatron_2023
from published import job_of, microbatches_of
from rows import rows
from software import software_of

GIB = 2**30


def main() -> None:
    errors: dict[str, list[float]] = {"with a pipeline": [], "without": []}
    print("| run | measured, GiB | predicted, GiB | error |\n|---|---|---|---|")
    for row in rows():
        if row["software"] != "nanotron":
            continue
        case = case_of(row)
        measured, predicted = row["measured"]["peak_bytes"], peak_bytes(case)[0]
        error = predicted / measured - 1
        errors["with a pipeline" if case.mesh.pp > 1 else "without"].append(abs(error))
        print(f"| {row['id']} | {measured / GIB:.2f} | {predicted / GIB:.2f} | {error:+.1%} |")
    for name, found in errors.items():
        print(f"\n{name}: {len(found)}, median {statistics.median(found):.1%}, largest {max(found):.1%}")


def case_of(row: dict[str, Any]) -> Case:
    """nanotron keeps bfloat16 weights and float32 sums of gradients whole, and cuts float32 weights and Adam's moments, as Megatron does
    with its distributed optimizer; its RMS norm (TritonRMSNorm) keeps its input and a number a row, as torch's does on a GPU."""
    job = job_of(row, software_of(row["software"], row["plan"]))
    microbatch, num_microbatches = microbatches_of(job)
    return Case(
        shape=job.shape,
        kernels=job.framework.kernels,
        accounting=megatron_2023(
            job.shape, num_tokens=microbatch * job.sequence, tp=job.mesh.tp, is_fp16=False
        ),
        mesh=job.mesh,
        layers_of=job.layers_of or (job.shape.layers,),
        sequence=job.sequence,
        microbatch=microbatch,
        num_microbatches=num_microbatches,
        zero=job.zero,
        recompute="none",
        schedule=job.schedule,
        is_sequence_parallel=job.is_sequence_parallel,
    )


if __name__ == "__main__":
    main()
