"""vTrain's 1,440 measured runs on a node of 8 A100 (MICRO 2024), and predictions of them that six factors correct.

    host        × the seconds in which the host launches one kernel: small models wait for it
    device      × seconds of kernels
    tp          × talk along tp
    head        × kernels of the head and the loss
    dp          × what of the gradients' reduction is seen
    pp          × a millisecond for each microbatch that is passed on: launching and waiting for sends

A unit takes max(device, host - talk) + talk, so that the factors act inside of what ``predict_step`` computes, not on its result.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
from frameworks import DEEPSPEED_MEGATRON, MEGATRON_LOSS_BYTES, Framework
from models import Kernels, Shape
from published import DATA, Job, cluster_of_gpu, microbatches_of, profile_of, setup_of
from scipy.optimize import least_squares

from shardstage.cluster import Cluster
from shardstage.cost import Links, Profile, UnitCost, predict_step
from shardstage.layout import Mesh

__all__ = ["FILE", "TRAINING_MODELS", "Factors", "Run", "fitted", "is_held_out", "predicted_s", "read_runs"]

FILE = DATA / "vtrain-measured" / "ground_truth_single.csv"
TRAINING_MODELS = frozenset({(1024, 16), (1024, 24), (2048, 12), (2048, 20)})
"""(hidden, layers); the other four models are held out."""

VOCAB = 51_200
PASSED_ON_S = 1e-3
GPU = "A100-80GB"
MEGATRON_DEEPSPEED = Framework(
    kernels=Kernels(attention="fused-softmax", dropout=0.1),
    is_compiled=True,
    execution=DEEPSPEED_MEGATRON,
    loss_bytes=MEGATRON_LOSS_BYTES,
)


@dataclass(frozen=True, kw_only=True)
class Run:
    job: Job
    measured_s: float


class Factors(NamedTuple):
    """All ones but ``pp``: nothing is corrected."""

    host: float = 1.0
    device: float = 1.0
    tp: float = 1.0
    head: float = 1.0
    dp: float = 1.0
    pp: float = 0.0


def read_runs() -> list[Run]:
    """Full recomputation, 1F1B, no ZeRO, gradients are reduced after the last backward."""
    with FILE.open(encoding="utf-8-sig") as file:
        return [_run(line) for line in csv.reader(file) if not line[0].startswith("#")]


def is_held_out(run: Run) -> bool:
    return (run.job.shape.hidden, run.job.shape.layers) not in TRAINING_MODELS


def predicted_s(runs: Sequence[Run], factors: Factors) -> np.ndarray:
    """Seconds of each run."""
    return np.array([_seconds(run.job, factors) for run in runs])


def fitted(runs: Sequence[Run]) -> Factors:
    """Factors that make the logarithms of predictions come nearest to those of the runs' times; outliers count linearly.

    Every third run serves: six numbers are known well from 240.
    """
    some = runs[::3]
    measured = np.log([run.measured_s for run in some])

    def misses(logs: np.ndarray) -> np.ndarray:
        missed: np.ndarray = np.log(predicted_s(some, Factors(*np.exp(logs)))) - measured
        return missed

    start = np.log((1.0, 1.0, 1.0, 1.0, 1.0, 0.5))
    found = least_squares(misses, start, loss="soft_l1", f_scale=0.1, diff_step=0.02, max_nfev=15)
    return Factors(*(float(factor) for factor in np.exp(found.x)))


def _run(line: Sequence[str]) -> Run:
    num_gpus, batch, microbatch, hidden, heads, layers, sequence, tp, dp, pp = map(int, line[:10])
    shape = Shape(
        layers=layers,
        hidden=hidden,
        ffn_hidden=4 * hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        vocab=VOCAB,
        mlp_mats=2,
        is_tied=True,
    )
    cluster, mesh = cluster_of_gpu(GPU, num_gpus), Mesh(dp=dp, tp=tp, pp=pp)
    job = _job(shape, sequence, cluster, mesh, microbatch=microbatch, batch=batch)
    return Run(job=job, measured_s=float(line[10]) / 1e3)


def _job(shape: Shape, sequence: int, cluster: Cluster, mesh: Mesh, *, microbatch: int, batch: int) -> Job:
    return Job(
        shape=shape,
        sequence=sequence,
        framework=MEGATRON_DEEPSPEED,
        cluster=cluster,
        mesh=mesh,
        stages_per_rank=1,
        schedule="1f1b",
        zero=0,
        recompute="full",
        microbatch=microbatch,
        global_batch=batch,
        is_sequence_parallel=False,
    )


def _seconds(job: Job, factors: Factors) -> float:
    microbatch, num_microbatches = microbatches_of(job)
    units = _corrected(job.shape, job.sequence, job.mesh.tp, microbatch, factors)
    setup = setup_of(job)
    prediction = predict_step(units, setup, _links(job.cluster, job.mesh))
    passed_on_s = PASSED_ON_S * (num_microbatches + job.mesh.pp - 1) if job.mesh.pp > 1 else 0.0
    return prediction.step_time_s + (factors.dp - 1) * prediction.exposed_dp_s + factors.pp * passed_on_s


@cache
def _links(cluster: Cluster, mesh: Mesh) -> Links:
    return Links(cluster, mesh)


@lru_cache(maxsize=4096)
def _corrected(shape: Shape, sequence: int, tp: int, microbatch: int, factors: Factors) -> Profile:
    at_once, by_host = (_profile(shape, sequence, tp, microbatch, dispatch_s) for dispatch_s in (0.0, 1.0))
    last = len(at_once.units) - 1
    units = list(_corrected_units(at_once.units[:last], by_host.units[:last], factors.device, factors))
    units += _corrected_units(at_once.units[last:], by_host.units[last:], factors.head, factors)
    return replace(at_once, units=tuple(units))


def _corrected_units(
    at_once: Sequence[UnitCost], by_host: Sequence[UnitCost], device: float, factors: Factors
) -> Iterator[UnitCost]:
    """``at_once`` are units whose host takes no time, ``by_host`` the same where it takes a second a kernel, which counts kernels."""
    dispatch_s = factors.host * _dispatch_s()
    for unit, counted in zip(at_once, by_host, strict=True):
        forward_talk_s, backward_talk_s = factors.tp * unit.tp_forward_s, factors.tp * unit.tp_backward_s
        num_forward = counted.forward_s + counted.tp_forward_s
        num_backward = counted.backward_s + counted.tp_backward_s
        forward_s = max(device * unit.forward_s, dispatch_s * num_forward - forward_talk_s)
        kept = unit.kept["full"]
        again_s = forward_s + forward_talk_s if kept.recompute_s else 0.0
        yield replace(
            unit,
            forward_s=forward_s,
            backward_s=max(device * unit.backward_s, dispatch_s * num_backward - backward_talk_s),
            tp_forward_s=forward_talk_s,
            tp_backward_s=backward_talk_s,
            kept={**unit.kept, "full": replace(kept, recompute_s=again_s)},
        )


@cache
def _profile(shape: Shape, sequence: int, tp: int, microbatch: int, dispatch_s: float) -> Profile:
    cluster = cluster_of_gpu(GPU, 8)
    model = cluster.device.kernels
    assert model is not None
    device = replace(cluster.device, kernels=replace(model, dispatch_s=dispatch_s))
    one_node = replace(cluster, device=device)
    job = _job(shape, sequence, one_node, Mesh(tp=tp), microbatch=microbatch, batch=microbatch)
    return profile_of(job)


def _dispatch_s() -> float:
    model = cluster_of_gpu(GPU, 8).device.kernels
    assert model is not None
    return model.dispatch_s
