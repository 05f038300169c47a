"""Megatron-LM's CI on A100: bytes allocated after a step, and at the peak, of the last rank.

Where a run's arguments do not say how many GPUs, it is a node of 8, as the tests' recipes have it. The logged bytes are 10^9 to a GB.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from cases import Case
from megatron import megatron_core, padded_vocab
from models import Kernels, Shape

from shardstage.layout import Mesh
from shardstage.schedule import Schedule, make_schedule

__all__ = ["CiRow", "case_of", "read", "why_not"]

GPT2_TOKENS = 50257
NODE_GPUS = 8
# Arguments that change what is held in a way that no Case can say.
INEXPRESSIBLE = (
    "--multi-latent-attention",
    "--use-megatron-fsdp",
    "--num-distributed-optimizer-instances",
    "--decoder-first-pipeline-num-layers",
    "--defer-embedding-wgrad-compute",
    "--cross-entropy-loss-fusion",
    "--overlap-param-gather-with-optimizer-step",
    "--spec",
)


@dataclass(frozen=True, kw_only=True)
class CiRow:
    """``backend``: what computed attention, as the arguments say; "auto": the framework chose by its version."""

    name: str
    row: dict[str, Any]

    @property
    def args(self) -> dict[str, Any]:
        return dict(self.row["args"])

    @property
    def backend(self) -> str:
        if self.args.get("--transformer-impl") == "local":
            return "unfused"
        return str(self.args.get("--attention-backend", "auto"))


def read(path: Path) -> Iterator[CiRow]:
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        yield CiRow(name=row["id"].removeprefix("mcoreci-"), row=row)


def why_not(ci: CiRow) -> str | None:
    """Why a row is left out, or None."""
    family, plan = ci.row["model"]["family"].split(":")[0], ci.row["plan"]
    if family != "gpt" or ci.row["model"].get("moe"):
        return f"family {family}"
    if plan["cp"] not in (1, None):
        return "context parallel"
    found = next((name for name in INEXPRESSIBLE if name in ci.args), None)
    if found:
        return found.removeprefix("--")
    if "release" in ci.name:
        return "number of GPUs not stated"
    if plan["zero"] not in (0, 1):
        return "megatron fsdp"
    if ci.args["--num-layers"] // _layers_each(ci) % plan["pp"]:
        return "stages of unequal layers"
    return None


def _layers_each(ci: CiRow) -> int:
    each = ci.args.get("--num-layers-per-virtual-pipeline-stage")
    return int(each or ci.args["--num-layers"] // ci.row["plan"]["pp"])


def case_of(ci: CiRow, *, is_flash: bool) -> Case:
    args, plan = ci.args, ci.row["plan"]
    tp, pp = plan["tp"], plan["pp"]
    layers, dp = args["--num-layers"], plan["dp"] or NODE_GPUS // (tp * pp)
    each = _layers_each(ci)
    microbatch, sequence = args["--micro-batch-size"], args["--seq-length"]
    shape = _shape(args, tp)
    is_local = args.get("--transformer-impl") == "local"
    is_unfused = not is_flash
    m = args["--global-batch-size"] // (microbatch * dp)
    return Case(
        shape=shape,
        kernels=Kernels(
            attention=_attention(args) if is_unfused else "flash",
            is_rotary=args.get("--position-embedding-type") == "rope",
            dropout=args.get("--hidden-dropout", 0.1),
            has_bias="--disable-bias-linear" not in args,
        ),
        accounting=megatron_core(
            shape,
            num_tokens=microbatch * sequence,
            tp=tp,
            is_fp16="--fp16" in args,
            num_scores=microbatch * shape.heads // tp * sequence**2 if is_unfused else 0,
            keeps_scores_buffer=is_local,
        ),
        mesh=Mesh(dp=dp, tp=tp, pp=pp),
        layers_of=(each,) * (layers // each),
        sequence=sequence,
        microbatch=microbatch,
        num_microbatches=m,
        zero=plan["zero"],
        recompute=plan["recompute"],
        schedule="1f1b",
        custom=_interleaved(layers // each, pp, m) if layers // each > pp else None,
        is_sequence_parallel=bool(plan["sp"]) and tp > 1,
        num_positions=args["--max-position-embeddings"],
        precision="float16" if "--fp16" in args else "bfloat16",
    )


def _attention(args: dict[str, Any]) -> Literal["fused-softmax", "written-out"]:
    """fused_softmax.py: without the fused kernel the softmax is torch's, in fp32 (which --apply-query-key-layer-scaling asks for)."""
    return "written-out" if "--no-masked-softmax-fusion" in args else "fused-softmax"


def _shape(args: dict[str, Any], tp: int) -> Shape:
    """Without --ffn-hidden-size a gated MLP is two thirds of 4 h wide, in steps of 64 (arguments.py)."""
    hidden, heads = args["--hidden-size"], args["--num-attention-heads"]
    is_gated = "--swiglu" in args
    default = int(4 * hidden * 2 / 3 / 64) * 64 if is_gated else 4 * hidden
    return Shape(
        layers=args["--num-layers"],
        hidden=hidden,
        ffn_hidden=args.get("--ffn-hidden-size", default),
        heads=heads,
        kv_heads=args.get("--num-query-groups", heads),
        head_dim=args.get("--kv-channels", hidden // heads),
        vocab=padded_vocab(args.get("--vocab-size", GPT2_TOKENS), tp),
        mlp_mats=3 if is_gated else 2,
        is_tied="--untie-embeddings-and-output-weights" not in args,
    )


@cache
def _interleaved(num_stages: int, num_ranks: int, num_microbatches: int) -> Schedule:
    return make_schedule(
        "interleaved-1f1b", num_stages=num_stages, num_ranks=num_ranks, num_microbatches=num_microbatches
    )
