"""Rows of ``runs.jsonl`` as Shardstage prices them: a graph of the row's model, a cluster, a setup, and how its framework ran it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from frameworks import LOSS_BYTES, Framework, framework_of
from models import Decoder, Kernels, Shape, mixtral

from shardstage.cluster import Cluster, load
from shardstage.cost import (
    Folded,
    Links,
    Prediction,
    Profile,
    Profiler,
    StepSetup,
    UnitCost,
    fold,
    predict_step,
    stage_times,
)
from shardstage.cost.compute import moved_s
from shardstage.cost.links import exposed_s
from shardstage.cost.pipeline import bubble_s
from shardstage.graph.capture import capture
from shardstage.graph.recompute import StageRecompute, parse_recompute
from shardstage.graph.source import ModelSource
from shardstage.graph.tasks import causal_task
from shardstage.layout import Mesh

__all__ = [
    "DATA",
    "Job",
    "cluster_of_gpu",
    "group_of",
    "is_ours",
    "job_of",
    "measured_s",
    "microbatches_of",
    "predict",
    "profile_of",
    "rows",
    "setup_of",
    "shape_of",
]

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
CAPTURED_LAYERS = 3
PRESETS = {"A100-80GB": "a100-80", "A100-40GB": "a100-40", "H100-80GB": "h100"}
TORCHTITAN_RECOMPUTE = "every-second-product"
MEGATRON_RECOMPUTE = "attention-core"
SECTIONS_AFTER_REPAIR = (
    "GBS Variations",
    "Another round of NHEADS",
    "Batchsize Warmup",
    "Re-do",
    "Rebalancing layers",
)
"""Of chronicles-prequel.md, whose "GBS Variations" begins: "A100s PCI-Express/NUMA was improved today so all TFLOPs have changed for the
better (1-5%) - thus do not compare today's numbers to yesterday's."."""


def rows(group: str | None = None) -> Iterator[dict[str, Any]]:
    """All runs, or those of a group."""
    text = (DATA / "published-runs" / "runs.jsonl").read_text(encoding="utf-8")
    for row in (json.loads(line) for line in text.splitlines()):
        if group in (None, row["group"]):
            yield row


def is_ours(row: dict[str, Any]) -> bool:
    """Whether a row is a timed run of what the cost model knows: dense decoders in 16 bits on devices with a preset."""
    plan, model = row["plan"], row["model"]
    return (
        "step_time" in row["usable_for"]
        and row["hardware"]["gpu"] in PRESETS
        and not model.get("moe")
        and bool(model["heads"])
        and plan.get("cp") in (1, None)
        and "fp8" not in plan["dtype"]
        and bool(plan["microbatch"])
        and plan["zero"] in (0, 1, 2, 3, "hsdp")
        and plan["recompute"] in ("none", "full", None)
        and not math.isnan(measured_s(row))
    )


def group_of(row: dict[str, Any]) -> str:
    """The runs that share software, devices and kernels."""
    name = f"{row['group']} {row['hardware']['gpu']}"
    if row["group"] == "megatron-sc21":
        return f"{name} {'ZeRO-3' if row['plan']['zero'] == 3 else 'PTD-P'}"
    if row["group"] == "bloom-prequel":
        is_late = any(section in row["source"] for section in SECTIONS_AFTER_REPAIR)
        return f"{name} {'after' if is_late else 'before'} the repair"
    if row["group"] == "hagemann-2023":
        return f"{name} {row['model']['family'][:9]} {row['plan']['attention_kernel']}"
    return name


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
        experts=model.get("experts", 0),
        per_token=model.get("per_token", 0),
    )


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that a prediction needs; ``layers_of`` are the layers of each stage where the source says so.

    Selective recomputation computes ``products_again`` of a layer's products, too.
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
    recompute: StageRecompute
    microbatch: int
    global_batch: int
    is_sequence_parallel: bool
    ep: int = 1
    zero_ranks: int | None = None
    products_again: float = 0.0
    layers_of: tuple[int, ...] = ()
    has_bubble: bool = True


def job_of(row: dict[str, Any], framework: Framework | None = None) -> Job:
    """``framework`` ran a row of none of the groups that ``framework_of`` knows."""
    model, plan = row["model"], row["plan"]
    mesh = Mesh(dp=plan["dp"], tp=plan["tp"], pp=plan["pp"], cp=plan.get("cp") or 1)
    vpp = plan.get("vpp") or 1
    framework = framework or framework_of(row)
    multiple = framework.vocab_multiple * mesh.tp
    shape = shape_of(model)
    again = _products_again(plan["recompute"], shape, model["seq_len"])
    return Job(
        shape=replace(shape, vocab=-(-model["vocab"] // multiple) * multiple),
        sequence=model["seq_len"],
        framework=framework,
        cluster=_as_run_by(framework, _cluster_of_row(row, mesh.world_size)),
        mesh=mesh,
        stages_per_rank=vpp,
        schedule="interleaved-1f1b"
        if vpp > 1
        else {"zb-1p": "zb-h1", "zb-2p": "zb-h1"}.get(plan["schedule"], "1f1b"),
        has_bubble=plan["schedule"] != "zb-2p",
        zero=plan["zero"] if plan["zero"] in (0, 1, 2, 3) else 3,
        recompute="selective" if again else parse_recompute(plan["recompute"] or "none") or "none",
        products_again=again,
        microbatch=plan["microbatch"],
        global_batch=plan["global_batch"],
        is_sequence_parallel=bool(plan["sp"]),
        ep=plan.get("ep") or 1,
        zero_ranks=row["hardware"]["gpus_per_node"]
        if plan["zero"] == "hsdp"
        else plan.get("zero_shard_size"),
        layers_of=_layers_of(row),
    )


def _products_again(recompute: str | None, shape: Shape, sequence: int) -> float:
    """Of the FLOPs of a layer's products and attention, what a framework's selective recomputation computes again.

    torchtitan keeps attention and the results of the first, third, ... product of q, k, v, out, gate, up, down (_get_custom_policy in
    parallelize_llama.py); of down's nothing needs the result. Megatron computes attention's own two products again, with what is between
    them, over all keys (Korthikanti et al. 2022, §5).
    """
    inner, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    products = [shape.hidden * w for w in (inner, keys, keys, inner, *(shape.ffn_hidden,) * shape.mlp_mats)]
    if recompute == TORCHTITAN_RECOMPUTE:
        return sum(products[1::2]) / (sum(products) + sequence * inner)
    if recompute == MEGATRON_RECOMPUTE:
        return 2 * sequence * inner / (sum(products) + 2 * sequence * inner)
    return 0.0


def _layers_of(row: dict[str, Any]) -> tuple[int, ...]:
    """Stages whose embedding and head take the place of a layer each, where the source says so (BLOOM, Zero Bubble)."""
    model, plan = row["model"], row["plan"]
    if plan.get("layers_of"):
        return tuple(plan["layers_of"])
    num_stages = plan["pp"] * (plan.get("vpp") or 1)
    slots = model["layers"] + 2
    has_slots = row["group"] in _WITH_SLOTS or plan.get("has_slots")
    if num_stages == 1 or slots % num_stages or not has_slots:
        return ()
    each = slots // num_stages
    return (each - 1, *(each for _ in range(num_stages - 2)), each - 1)


_WITH_SLOTS = ("bloom-prequel", "bloom-production", "zero-bubble")


def predict(job: Job, units: Profile | None = None) -> Prediction:
    """Seconds and bytes of a step, from ``profile_of(job)`` or from what became of it."""
    units = units or profile_of(job)
    setup = setup_of(job)
    links = Links(job.cluster, job.mesh, num_shards=job.zero_ranks, ep=job.ep)
    prediction = predict_step(units, setup, links)
    if job.has_bubble:
        return prediction
    bubble = bubble_s(job.schedule, stage_times(units, setup, links), job.mesh.pp, setup.num_microbatches)
    return replace(prediction, step_time_s=prediction.step_time_s - bubble)


def profile_of(job: Job) -> Profile:
    """Costs of all units of a job's model for one microbatch."""
    few = _few(job.shape)
    node = replace(job.cluster, num_devices=max(8, job.mesh.tp))  # where tensor parallelism stays
    profiler = _profiler(few, job.framework, node, job.mesh.tp, job.sequence, job.is_sequence_parallel)
    microbatch, _ = microbatches_of(job)
    kept = profiler.at(microbatch, Links(job.cluster, job.mesh, ep=job.ep))
    share = microbatch / job.mesh.cp
    units = [_overlapped(unit, job) for unit in kept.units]
    *first, last = (_again(_with_gates(unit, job, share), job) for unit in units[:-1])
    more = job.shape.layers - few.layers
    return replace(
        kept,
        units=(*first, *(last,) * (more + 1), _with_loss(units[-1], job, share)),
        whole_flops=kept.whole_flops + more * last.forward_flops * job.mesh.tp,
    )


def _overlapped(unit: UnitCost, job: Job) -> UnitCost:
    """A unit whose framework sends and receives along tp beside the products, all but the first of tp parts, or sums its input's gradients
    beside the products for weights' gradients: with sequence parallelism the half of the backward's talk that scatters."""
    framework = job.framework
    if job.mesh.tp == 1 or not (framework.overlaps_tp or framework.overlaps_tp_backward):
        return unit
    slowdown = Links(job.cluster, job.mesh).overlap_slowdown
    if not framework.overlaps_tp:
        sum_s = unit.tp_backward_s * (0.5 if job.is_sequence_parallel else 1.0)
        waited_s = unit.tp_backward_s - sum_s
        return replace(unit, tp_backward_s=waited_s + exposed_s(sum_s, unit.weight_s, slowdown))
    talks = ((unit.tp_forward_s, unit.forward_s), (unit.tp_backward_s, unit.backward_s))
    forward_s, backward_s = (exposed_s(talk, busy, slowdown, talk / job.mesh.tp) for talk, busy in talks)
    return replace(unit, tp_forward_s=forward_s, tp_backward_s=backward_s)


def _again(unit: UnitCost, job: Job) -> UnitCost:
    """A layer whose selective recomputation computes products, too."""
    full, selective = unit.kept["full"], unit.kept["selective"]
    more_s = job.products_again * (full.recompute_s - selective.recompute_s)
    again = replace(selective, recompute_s=selective.recompute_s + more_s)
    return replace(unit, kept={**unit.kept, "selective": again}) if more_s else unit


def _with_gates(unit: UnitCost, job: Job, microbatch: float) -> UnitCost:
    """A layer whose framework sums the gradient of an MLP's input for each of its products."""
    tp = job.mesh.tp
    if (
        tp == 1
        or not job.framework.num_gates
        or job.is_sequence_parallel
        or not unit.kept["full"].recompute_s
    ):
        return unit
    num_bytes = round(2 * microbatch * job.sequence * job.shape.hidden)
    sum_s = job.cluster.collective("all_reduce", range(tp)).seconds(num_bytes)
    return replace(unit, tp_backward_s=unit.tp_backward_s + job.framework.num_gates * sum_s)


def _with_loss(head: UnitCost, job: Job, microbatch: float) -> UnitCost:
    """The head and the loss, as the framework computes it."""
    tp, device = job.mesh.tp, job.cluster.device
    num_logits = round(microbatch * job.sequence * job.shape.vocab)
    head = replace(
        head, forward_s=head.forward_s + moved_s(job.framework.loss_bytes * num_logits / tp, device)
    )
    if tp == 1 or not job.framework.gathers_logits:
        return head
    gather_s = job.cluster.collective("all_gather", range(tp)).seconds(2 * num_logits)
    others = num_logits * (1 - 1 / tp)
    return replace(
        head,
        forward_s=head.forward_s + moved_s(4 * num_logits + LOSS_BYTES * others, device),
        backward_s=head.backward_s + moved_s(LOSS_BYTES * others, device),
        tp_forward_s=head.tp_forward_s + gather_s,
    )


def microbatches_of(job: Job) -> tuple[int, int]:
    """Samples of a microbatch, and how many of these a data-parallel rank runs: of the size asked for, or evened out."""
    share = -(-job.global_batch // job.mesh.dp)
    num_microbatches = -(-share // job.microbatch)
    return -(-share // num_microbatches), num_microbatches


def setup_of(job: Job) -> StepSetup:
    """The plan of a job: the embedding goes with the first layer, the head with the last."""
    microbatch, num_microbatches = microbatches_of(job)
    layers = job.layers_of or tuple(_even_layers(job.shape.layers, job.mesh.pp * job.stages_per_rank))
    return StepSetup(
        mesh=job.mesh,
        starts=(0, *(1 + at for at in accumulate(layers[:-1]))),
        microbatch=microbatch,
        num_microbatches=num_microbatches,
        global_batch=job.global_batch,
        sequence=job.sequence,
        zero=job.zero,
        zero_ranks=job.zero_ranks,
        ep=job.ep,
        recompute=job.recompute,
        layers=(-1, *range(job.shape.layers), -1),
        schedule=job.schedule,
        precision="bfloat16",
        bucket_bytes=job.framework.bucket_bytes,
        execution=job.framework.execution,
    )


def _even_layers(num_layers: int, num_stages: int) -> Iterator[int]:
    """As equally many layers a stage as can be, the first ones have one more."""
    for stage in range(num_stages):
        yield num_layers // num_stages + (stage < num_layers % num_stages)


@cache
def _profiler(
    few: Shape, framework: Framework, cluster: Cluster, tp: int, sequence: int, is_sp: bool
) -> Profiler:
    return Profiler(
        _captured(few, framework.kernels, sequence),
        cluster,
        tp=tp,
        sequence=sequence,
        is_sequence_parallel=is_sp,
        is_compiled=framework.is_compiled,
        waits_for_kernels=framework.waits_for_kernels,
    )


@cache
def cluster_of_gpu(gpu: str, num_devices: int) -> Cluster:
    return load(f"{PRESETS[gpu]}:{num_devices}")


def cluster_of(hardware: dict[str, Any], num_devices: int) -> Cluster:
    """The preset with the network that the source states, at the ratio of achieved to nominal bandwidth of the preset."""
    cluster = cluster_of_gpu(hardware["gpu"], num_devices)
    cluster = replace(cluster, device=replace(cluster.device, **hardware.get("device", {})))
    nominal = hardware["inter_bw_GBs_per_gpu"]
    if not nominal:
        return cluster
    node, network = cluster.levels
    return replace(cluster, levels=(node, replace(network, bytes_per_s=0.96e9 * nominal)))


def _cluster_of_row(row: dict[str, Any], num_devices: int) -> Cluster:
    cluster = cluster_of(row["hardware"], num_devices)
    if not row["group"].startswith("bloom"):
        return cluster
    node, network = cluster.levels
    return replace(cluster, levels=(node, replace(network, bytes_per_s=JEAN_ZAY_BYTES_PER_S)))


JEAN_ZAY_BYTES_PER_S = 4 * 40.5e9 / 8 / 8
"""A GPU's eighth of what its node's four Omni-Path adapters carry: 40.5 Gbit/s each, not the 100 that they are sold for. So NCCL 2.10
summed 4 GB over four nodes of Jean Zay, one adapter of each sending (experiments/bandwidth/all_reduce_bench-a100-n4.txt by BLOOM's authors,
github.com/bigscience-workshop/bigscience; their README there: NCCL "doesn't fully utilize Intel OPA full bandwidth")."""


@cache
def _as_run_by(framework: Framework, cluster: Cluster) -> Cluster:
    """What other kernels reached of FlashAttention-2's rate and of today's products, and what a framework's host takes for a kernel."""
    model = cluster.device.kernels
    assert model is not None
    factor = SLOWER_ATTENTION.get(framework.kernels.attention, 1.0)
    slower = replace(
        model,
        tiles=tuple(tile._replace(ratio=tile.ratio * framework.products_ratio) for tile in model.tiles),
        dispatch_s=framework.dispatch_s or model.dispatch_s,
        attention_forward_ratio=model.attention_forward_ratio / factor,
        attention_backward_ratio=model.attention_backward_ratio / factor,
    )
    return replace(cluster, device=replace(cluster.device, kernels=slower))


SLOWER_ATTENTION = {"flash-1": 2.0, "flash-triton": 1.5, "cudnn": 1 / 1.6}
"""FlashAttention-2 is around 2 times as fast as its first version and 1.3 to 2.5 times as that in Triton (Dao, "FlashAttention-2", 2023,
§4.1). On an H100 cuDNN's is 1.6 times as fast: 518 and 529 TFLOP/s where it reaches 319 and 333, backward 499 and 518 for 310 and 318
(heads of 128, 4,096 and 8,192 positions; Shah et al., "FlashAttention-3", 2024, figures 5 and 6)."""


def _few(shape: Shape) -> Shape:
    return replace(shape, layers=min(CAPTURED_LAYERS, shape.layers))


def _captured(shape: Shape, kernels: Kernels, sequence: int) -> Folded:
    """Without a table of positions a graph serves all sequences."""
    return _captured_with(shape, kernels, 2048 if kernels.is_rotary else sequence)


@cache
def _captured_with(shape: Shape, kernels: Kernels, num_positions: int) -> Folded:
    source = ModelSource(
        name="decoder",
        factory=lambda: mixtral(shape) if shape.experts else Decoder(shape, kernels, num_positions),
        task=causal_task(shape.vocab),
        vocab_size=shape.vocab,
    )
    return fold(capture(source, sequence=min(num_positions, 2048), dtype="bfloat16"))
