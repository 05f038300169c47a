"""Holds predicted step times against published runs on cards that people own: ``cards.toml``.

Usage: python benchmarks/planner/elsewhere/cards.py [--only GROUP] [--rows]
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from errors import print_run, print_table
from frameworks import LOSS_BYTES, MEGATRON_2021, MEGATRON_LOSS_BYTES, MEGATRON_VOCAB_MULTIPLE, Framework
from models import Kernels, Shape
from published import Job, predict

from shardstage.cluster import Cluster, load
from shardstage.cost import Execution, Prediction
from shardstage.layout import Mesh

RUNS = Path(__file__).with_name("cards.toml")

AUTOCAST = Execution(
    accumulation_bytes=24.0,  # parameters cast to bfloat16 (6), gradients cast back (6) and added to the sum (12), all each microbatch
    wire_bytes=4.0,
)
"""torch.autocast around a model in float32, gradients summed by DistributedDataParallel where there are ranks."""

COMPILED_LOSS_BYTES = 8.0
"""These scripts compile the model with its loss: logits in bfloat16 are read for their maximum and for the sum of their exponentials
(github.com/pytorch/pytorch issue 124145: "the standard 3 pass algorithm"), and backward for the gradient, which is written; no float32
logits are (github.com/pytorch/torchtitan pull request 551: the cast "inside this compiled loss")."""

NANOGPT = Framework(
    kernels=Kernels(has_bias=False),
    is_compiled=True,
    execution=AUTOCAST,
    loss_bytes=COMPILED_LOSS_BYTES - 2 * LOSS_BYTES,
)

MEGATRON = Framework(
    kernels=Kernels(attention="fused-softmax", dropout=0.1),
    is_compiled=True,
    execution=MEGATRON_2021,
    loss_bytes=MEGATRON_LOSS_BYTES,
    vocab_multiple=MEGATRON_VOCAB_MULTIPLE,
)

SOFTWARE = {
    "nanogpt": NANOGPT,
    "speedrun": replace(
        NANOGPT,
        kernels=Kernels(norm="rms", has_bias=False),
        bucket_bytes=25 * 2**20,  # bucket_cap_mb
    ),
    "runpod": replace(NANOGPT, kernels=Kernels()),
    "megatron-2020": MEGATRON,
    "megatron-2021": MEGATRON,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="part of a group's name")
    parser.add_argument("--rows", action="store_true", help="print every run")
    arguments = parser.parse_args()
    found = tomllib.loads(RUNS.read_text(encoding="utf-8"))
    errors: dict[str, list[float]] = defaultdict(list)
    for group in found["group"]:
        if arguments.only not in group["name"]:
            continue
        for run in group["run"]:
            shape = shape_of(found["model"][run["model"]])
            prediction = predicted(shape, group, run)
            errors[group["name"]].append(prediction.step_time_s / run["step_s"] - 1)
            if arguments.rows:
                print_run(
                    f"{group['name']} {run['model']} dp={run.get('dp', 1)} tp={run.get('tp', 1)} mb={run['microbatch']}",
                    run["step_s"],
                    prediction,
                )
    print_table(errors)


def shape_of(model: dict[str, Any]) -> Shape:
    """A GPT-2's: its words are tied, and its MLP is two products."""
    return Shape(
        **model, kv_heads=model["heads"], head_dim=model["hidden"] // model["heads"], mlp_mats=2, is_tied=True
    )


def predicted(shape: Shape, group: dict[str, Any], run: dict[str, Any]) -> Prediction:
    """A step; of several that sum gradients, one update."""
    syncs = group.get("syncs", 1)
    prediction = predict(job_of(shape, group, run, batch=run["batch"] // syncs))
    step_s = syncs * (prediction.step_time_s - prediction.optimizer_s) + prediction.optimizer_s
    return replace(prediction, step_time_s=step_s)


def job_of(shape: Shape, group: dict[str, Any], run: dict[str, Any], *, batch: int) -> Job:
    mesh = Mesh(dp=run.get("dp", 1), tp=run.get("tp", 1), pp=run.get("pp", 1))
    framework = SOFTWARE[group["software"]]
    multiple = framework.vocab_multiple * mesh.tp
    return Job(
        shape=replace(shape, vocab=-(-shape.vocab // multiple) * multiple),
        sequence=group["sequence"],
        framework=framework,
        cluster=cluster_of(group, mesh.world_size),
        mesh=mesh,
        stages_per_rank=1,
        schedule="1f1b",
        zero=0,
        recompute=group.get("recompute", "none"),
        microbatch=run["microbatch"],
        global_batch=batch,
        is_sequence_parallel=False,
    )


def cluster_of(group: dict[str, Any], num_devices: int) -> Cluster:
    """The preset; behind switches any few GPUs have among them what all of a cube mesh have: the six links of each (NVIDIA DGX-2 data
    sheet)."""
    cluster = in_16_bits(load(f"{group['cluster']}:{num_devices}"))
    if group.get("has_switches"):
        cluster = replace(cluster, collectives=())
    if "network_bytes_per_s" in group:
        node, network = cluster.levels
        cluster = replace(cluster, levels=(node, replace(network, bytes_per_s=group["network_bytes_per_s"])))
    return cluster


def in_16_bits(cluster: Cluster) -> Cluster:
    """As ``published`` computes in bfloat16, whose bytes are float16's: where a device has none, at float16's rate."""
    device = cluster.device
    if device.has_bfloat16:
        return cluster
    rates = {**device.flops_per_s, "bfloat16": device.flops_per_s["float16"]}
    return replace(cluster, device=replace(device, flops_per_s=rates))


if __name__ == "__main__":
    main()
