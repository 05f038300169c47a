"""Rows of ``runs.jsonl`` as Shardstage prices them: a graph of the row's model, a cluster, a setup, and how its framework ran it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from models import Decoder, Kernels, Shape

from shardstage.cluster import Cluster, load
from shardstage.cost import (
    Execution,
    Folded,
    Links,
    Prediction,
    Profiler,
    StepSetup,
    fold,
    predict_step,
    stage_times,
)
from shardstage.cost.pipeline import bubble_s
from shardstage.graph.capture import capture
from shardstage.graph.source import ModelSource
from shardstage.graph.tasks import causal_task
from shardstage.layout import Mesh

__all__ = ["DATA", "Framework", "Job", "framework_of", "measured_s", "predict", "rows", "shape_of"]

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
CAPTURED_LAYERS = 3
PRESETS = {"A100-80GB": "a100-80", "A100-40GB": "a100-40", "H100-80GB": "h100"}


@dataclass(frozen=True, kw_only=True)
class Framework:
    """What a group's software did: kernels, whether pointwise chains were compiled, and the step around them."""

    kernels: Kernels
    is_compiled: bool
    execution: Execution
    bucket_bytes: int = 200 * 2**20


MEGATRON_2021 = Execution(
    accumulation_bytes=6.0,  # param.grad += grad in fp16: no contiguous fp32 buffer yet
    wire_bytes=2.0,
    overlaps_gradients=False,  # DDP "local": all_reduce after the last microbatch
    overlaps_sends=False,  # send_forward_recv_backward waits
    scatters_sends=True,  # SC21 §4.1, scatter/gather optimisation
)
DEEPSPEED_MEGATRON = replace(MEGATRON_2021, scatters_sends=False)
FSDP = Execution(accumulation_bytes=0.0, wire_bytes=4.0)
INTERNEVO = Execution(accumulation_bytes=6.0, wire_bytes=2.0, overlaps_sends=False)
ALEPH_ALPHA = replace(DEEPSPEED_MEGATRON, accumulation_bytes=10.0)


def framework_of(row: dict[str, Any]) -> Framework:
    group, plan = row["group"], row["plan"]
    gated = row["model"]["mlp_mats"] == 3
    if group.startswith("megatron"):
        return Framework(
            kernels=Kernels(attention="fused-softmax", dropout=0.1),
            is_compiled=True,
            execution=FSDP if plan["zero"] == 3 else MEGATRON_2021,
        )
    if group == "zero-bubble":
        return Framework(
            kernels=Kernels(attention="fused-softmax", dropout=0.1), is_compiled=True, execution=MEGATRON_2021
        )
    if group.startswith("bloom"):
        return Framework(
            kernels=Kernels(attention="fused-softmax", dropout=0.1),
            is_compiled=True,
            execution=DEEPSPEED_MEGATRON,
        )
    if group == "hagemann-2023":
        kernel = plan["attention_kernel"]
        return Framework(
            kernels=Kernels(
                attention=_HAGEMANN_ATTENTION[kernel.split(" ")[0]],
                norm="rms" if "RMS" in kernel else "eager-rms",
                is_rotary=True,
                has_bias=False,
            ),
            is_compiled=False,
            execution=ALEPH_ALPHA,
        )
    return Framework(
        kernels=Kernels(
            attention="flash-triton" if group == "mosaic-llm-foundry" else "flash",
            norm="rms" if gated else "layer",
            is_rotary=gated,
            has_bias=False,
        ),
        is_compiled=bool(plan.get("compile")),
        execution=INTERNEVO if group == "internevo" else FSDP,
    )


_HAGEMANN_ATTENTION: dict[str, Any] = {
    "torch": "written-out",
    "fused": "fused-softmax",
    "flash_attentionv1.0.8": "flash-1",
    "flash_attention2": "flash",
}


def rows() -> Iterator[dict[str, Any]]:
    text = (DATA / "published-runs" / "runs.jsonl").read_text(encoding="utf-8")
    yield from (json.loads(line) for line in text.splitlines())


def measured_s(row: dict[str, Any]) -> float:
    return float((row["derived"] or {}).get("step_time_s") or row["measured"]["step_time_s"])


def shape_of(model: dict[str, Any]) -> Shape:
    heads = model["heads"]
    return Shape(
        layers=model["layers"],
        hidden=model["hidden"],
        ffn_hidden=model["ffn_hidden"],
        heads=heads,
        kv_heads=model.get("kv_heads") or heads,
        head_dim=model.get("head_dim") or model["hidden"] // heads,
        vocab=model["vocab"],
        mlp_mats=model["mlp_mats"],
        is_tied=bool(model["tied_embeddings"]),
    )


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that a prediction needs; ``layers_of`` are the layers of each stage where the source says so.

    ZB-2p, which holds twice the activations, has no bubble where F + I <= 2W (Qi et al. 2023, table 2).
    """

    shape: Shape
    sequence: int
    framework: Framework
    cluster: Cluster
    mesh: Mesh
    stages_per_rank: int
    schedule: str
    zero: int
    recompute: str
    microbatch: int
    global_batch: int
    is_sequence_parallel: bool
    layers_of: tuple[int, ...] = ()
    has_bubble: bool = True


def job_of(row: dict[str, Any]) -> Job:
    model, plan = row["model"], row["plan"]
    mesh = Mesh(dp=plan["dp"], tp=plan["tp"], pp=plan["pp"])
    vpp = plan.get("vpp") or 1
    return Job(
        shape=shape_of(model),
        sequence=model["seq_len"],
        framework=framework_of(row),
        cluster=_with_attention(cluster_of(row["hardware"], mesh.world_size), framework_of(row).kernels),
        mesh=mesh,
        stages_per_rank=vpp,
        schedule="interleaved-1f1b"
        if vpp > 1
        else {"zb-1p": "zb-h1", "zb-2p": "zb-h1"}.get(plan["schedule"], "1f1b"),
        has_bubble=plan["schedule"] != "zb-2p",
        zero=plan["zero"] if plan["zero"] in (0, 1, 2, 3) else 3,
        recompute=plan["recompute"] if plan["recompute"] in ("none", "full") else "none",
        microbatch=plan["microbatch"],
        global_batch=plan["global_batch"],
        is_sequence_parallel=bool(plan["sp"]),
        layers_of=_layers_of(row),
    )


def _layers_of(row: dict[str, Any]) -> tuple[int, ...]:
    """Stages whose embedding and head take the place of a layer each, where the source says so (BLOOM, Zero Bubble)."""
    model, plan = row["model"], row["plan"]
    num_stages = plan["pp"] * (plan.get("vpp") or 1)
    slots = model["layers"] + 2
    if num_stages == 1 or slots % num_stages or row["group"] not in _WITH_SLOTS:
        return ()
    each = slots // num_stages
    return (each - 1, *(each for _ in range(num_stages - 2)), each - 1)


_WITH_SLOTS = ("bloom-prequel", "bloom-production", "zero-bubble")


def predict(job: Job) -> Prediction:
    folded = _unfolded(_captured(_few(job.shape), job.framework.kernels, job.sequence), job.shape.layers)
    share = -(-job.global_batch // job.mesh.dp)
    num_microbatches = -(-share // job.microbatch)
    microbatch = -(-share // num_microbatches)
    priced = _profiler(
        _few(job.shape),
        job.shape.layers,
        job.framework,
        job.cluster,
        job.mesh.tp,
        job.sequence,
        job.is_sequence_parallel,
    ).at(microbatch)
    num_stages = job.mesh.pp * job.stages_per_rank
    if job.layers_of:
        starts, at = [0], 1
        for layers in job.layers_of[:-1]:
            at += layers
            starts.append(at)
    else:
        starts = list(_even_layers(folded, num_stages))
    setup = StepSetup(
        mesh=job.mesh,
        starts=tuple(starts),
        microbatch=microbatch,
        num_microbatches=num_microbatches,
        global_batch=job.global_batch,
        sequence=job.sequence,
        zero=job.zero,
        recompute=job.recompute,  # type: ignore[arg-type]
        schedule=job.schedule,
        precision="bfloat16",
        bucket_bytes=job.framework.bucket_bytes,
        execution=job.framework.execution,
    )
    prediction = predict_step(priced, setup, Links(job.cluster, job.mesh))
    if job.has_bubble:
        return prediction
    times = stage_times(priced, setup, Links(job.cluster, job.mesh))
    bubble = bubble_s(job.schedule, times, job.mesh.pp, num_microbatches)
    return replace(prediction, step_time_s=prediction.step_time_s - bubble)


def _even_layers(folded: Folded, num_stages: int) -> Iterator[int]:
    """Equally many layers a stage, the embedding with the first and the head with the last, as Megatron cuts."""
    layers = [i for i, unit in enumerate(folded.units) if unit.module]
    sizes = [len(layers) // num_stages + (s < len(layers) % num_stages) for s in range(num_stages)]
    yield 0
    at = layers[0]
    for size in sizes[:-1]:
        at += size
        yield at


@cache
def _profiler(
    few: Shape, num_layers: int, framework: Framework, cluster: Cluster, tp: int, sequence: int, is_sp: bool
) -> Profiler:
    folded = _unfolded(_captured(few, framework.kernels, sequence), num_layers)
    return Profiler(
        folded,
        cluster,
        tp=tp,
        sequence=sequence,
        is_sequence_parallel=is_sp,
        is_compiled=framework.is_compiled,
    )


@cache
def cluster_of_gpu(gpu: str, num_devices: int) -> Cluster:
    return load(f"{PRESETS[gpu]}:{num_devices}")


def cluster_of(hardware: dict[str, Any], num_devices: int) -> Cluster:
    """The preset with the network that the source states, at the ratio of achieved to nominal bandwidth of the preset."""
    cluster = cluster_of_gpu(hardware["gpu"], num_devices)
    nominal = hardware["inter_bw_GBs_per_gpu"]
    if not nominal:
        return cluster
    node, network = cluster.levels
    return replace(cluster, levels=(node, replace(network, bytes_per_s=0.96e9 * nominal)))


@cache
def _with_attention(cluster: Cluster, kernels: Kernels) -> Cluster:
    """What earlier kernels reached of FlashAttention-2's rate: it is 1.7 to 3 times as fast as its first version, and 1.3 to 2.5 times as
    that in Triton (Dao, "FlashAttention-2", 2023, §4.1)."""
    model = cluster.device.kernels
    factor = {"flash-1": 2.0, "flash-triton": 1.5}.get(kernels.attention)
    if factor is None or model is None:
        return cluster
    slower = replace(
        model,
        attention_forward_ratio=model.attention_forward_ratio / factor,
        attention_backward_ratio=model.attention_backward_ratio / factor,
    )
    return replace(cluster, device=replace(cluster.device, kernels=slower))


def _few(shape: Shape) -> Shape:
    return replace(shape, layers=min(CAPTURED_LAYERS, shape.layers))


@cache
def _captured(shape: Shape, kernels: Kernels, sequence: int) -> Folded:
    source = ModelSource(
        name="decoder",
        factory=lambda: Decoder(shape, kernels, 2**17),
        task=causal_task(shape.vocab),
        vocab_size=shape.vocab,
    )
    return fold(capture(source, sequence=min(sequence, 2048), dtype="bfloat16"))


def _unfolded(folded: Folded, num_layers: int) -> Folded:
    """The same model with more layers: the last layer's unit is repeated."""
    last = max(i for i, unit in enumerate(folded.units) if unit.module)
    present = sum(bool(unit.module) for unit in folded.units)
    more = (folded.units[last],) * (num_layers - present)
    return replace(folded, units=(*folded.units[: last + 1], *more, *folded.units[last + 1 :]))
