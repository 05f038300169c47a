"""Plans whose dry runs are held against their Programs: odd sizes first, every schedule and ZeRO level, models with ties and experts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from shardstage.graph import ModelGraph
from shardstage.graph.capture import capture
from shardstage.graph.source import ModelSource, load_model
from shardstage.plan import Plan, check, complete, parse_request
from shardstage.program import Program, StageGraphs, lower
from shardstage.runtime.dry_run import DryRun, dry_run
from shardstage.runtime.optimizer import OptimizerConfig

SEQUENCE = 8
OPTIMIZER = OptimizerConfig()

_HEADS: Mapping[str, Any] = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "vocab_size": 101,
}
_CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 4,
        "intermediate_size": 88,
        **_HEADS,
    },
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "num_local_experts": 3,
        **_HEADS,
    },
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": 32,
        "n_layer": 4,
        "n_head": 4,
        "vocab_size": 101,
        "n_positions": 64,
    },
    "t5": {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": 0,
        "vocab_size": 101,
    },
}

CASES: Mapping[str, tuple[str, str, int, int]] = {
    "uneven tp, sp, recompute": ("llama", "tp=3,sp,mb=2,recompute=full", 3, 5),
    "uneven shares, pp=3": ("llama", "dp=2,pp=3,mb=2,shares=5/3,zero=1", 6, 8),
    "three axes in bfloat16": ("llama", "dp=3,tp=2,pp=2,mb=2,zero=1,dtype=bf16,recompute=selective", 12, 11),
    "zero=2, experts": ("mixtral", "dp=3,pp=2,mb=1,zero=2", 6, 9),
    "zero=3, ties, several in flight": ("gpt2", "dp=3,tp=2,pp=2,mb=2,zero=3", 12, 18),
    "zero=3, bfloat16, recompute": ("llama", "dp=3,mb=1,zero=3,recompute=full,dtype=bf16", 3, 6),
    "first layers of each stage": ("llama", "pp=2,tp=2,mb=2,stages=full:1/selective:1", 4, 6),
    "named modules": ("llama", "pp=2,tp=2,mb=2,recompute=full:1+selective,modules=*.mlp/*norm", 4, 6),
    "zero=3, named modules": ("gpt2", "dp=3,mb=1,zero=3,recompute=selective,modules=*.attn/*.act", 3, 6),
    "zero=3, first layers": ("llama", "dp=3,mb=1,zero=3,recompute=full:1,dtype=bf16", 3, 6),
    "ties over pp, tp=3": ("gpt2", "pp=2,tp=3,mb=2", 6, 6),
    "narrow gradients, offloaded": (
        *("llama", "dp=3,tp=2,mb=2,zero=1,dtype=bf16,grads=bf16,offload=optimizer"),
        *(6, 11),
    ),
    "zero=3, rows of narrow gradients": ("gpt2", "dp=3,mb=1,zero=3,dtype=bf16,grads=bf16", 3, 6),
    "zero=2, offloaded": ("llama", "dp=2,pp=2,mb=1,zero=2,offload=optimizer", 4, 6),
    "offloaded without buckets": ("llama", "pp=3,mb=2,offload=optimizer", 3, 6),
    "encoder and decoder": ("t5", "pp=3,tp=2,mb=2", 6, 7),
    "encoder and decoder, zero=3": ("t5", "pp=2,dp=2,mb=1,zero=3", 4, 6),
    "gpipe": ("gpt2", "pp=2,mb=1,schedule=gpipe,dp=2", 4, 8),
    "interleaved": ("gpt2", "pp=2,mb=1,schedule=interleaved-1f1b,dp=2", 4, 8),
    "zb-h1": ("llama", "pp=3,mb=1,schedule=zb-h1,zero=1,dp=2", 6, 8),
    "zb-v": ("llama", "pp=2,mb=1,schedule=zb-v,dp=2", 4, 8),
    "dualpipe-v": ("gpt2", "pp=2,mb=1,schedule=dualpipe-v,tp=2", 4, 6),
}
"""Model, plan, ranks and global batch."""


class Rehearsed(NamedTuple):
    source: ModelSource
    graph: ModelGraph
    plan: Plan
    graphs: StageGraphs
    program: Program

    def run(self, rank: int, program: Program | None = None) -> DryRun:
        return dry_run(
            self.graph,
            self.plan,
            self.source,
            rank=rank,
            optimizer=OPTIMIZER,
            program=program or self.program,
            graphs=self.graphs,
        )


@cache
def source_of(model: str) -> ModelSource:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(_CONFIGS[model]))
        return load_model(str(path))


@cache
def graph_of(model: str, dtype: Any) -> ModelGraph:
    return capture(source_of(model), sequence=SEQUENCE, dtype=dtype)


def rehearsed(model: str, shorthand: str, num_ranks: int, global_batch: int) -> Rehearsed:
    request = parse_request(shorthand)
    precision = request.precision or "float32"
    graph = graph_of(model, precision)
    plan = complete(
        request,
        graph,
        num_ranks=num_ranks,
        global_batch=global_batch,
        sequence=SEQUENCE,
        precision=precision,
    )
    check(plan, graph, num_ranks=num_ranks)
    graphs = StageGraphs(graph, plan)
    return Rehearsed(source_of(model), graph, plan, graphs, lower(graph, plan, graphs))


@cache
def case(name: str) -> Rehearsed:
    return rehearsed(*CASES[name])
