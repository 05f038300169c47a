"""Lowered programs of small models, captured once: every schedule, ZeRO level and mixture of axes at odd sizes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from shardstage.graph import ModelGraph
from shardstage.graph.capture import capture
from shardstage.graph.source import load_model
from shardstage.plan import complete, parse_request
from shardstage.program import Program, lower

SEQUENCE = 8

CASES: Mapping[str, tuple[str, str, int, int]] = {
    "alone": ("llama-tiny", "mb=3", 1, 7),
    "pp=3": ("llama-tiny", "pp=3,mb=2", 3, 7),
    "gpipe": ("llama-tiny", "pp=3,mb=1,schedule=gpipe", 3, 5),
    "uneven shares": ("llama-tiny", "dp=3,pp=2,mb=2,shares=5/3/2", 6, 10),
    "tp=3": ("llama-tiny", "tp=3,sp,zero=0,mb=2", 3, 5),
    "three axes": ("llama-tiny", "dp=2,tp=2,pp=2,mb=2,zero=1", 8, 8),
    "ties": ("gpt2-tiny", "pp=3,mb=1,dp=2,zero=1", 6, 6),
    "ties, tp": ("gpt2-tiny", "pp=2,tp=3,mb=2", 6, 6),
    "zero=2": ("llama-tiny", "dp=3,pp=2,mb=1,zero=2", 6, 9),
    "zero=3": ("gpt2-tiny", "dp=3,pp=2,mb=2,zero=3", 6, 9),
    "zero=3, tp": ("gpt2-tiny", "dp=2,tp=2,mb=2,zero=3", 4, 7),
    "zero=3, recompute": ("llama-tiny", "dp=2,zero=3,mb=1,recompute=full", 2, 4),
    "zero=3, first layers": ("llama-tiny", "dp=2,tp=2,zero=3,mb=1,recompute=full:2+selective:1", 4, 4),
    "interleaved": ("gpt2-tiny", "pp=2,mb=1,schedule=interleaved-1f1b,dp=2", 4, 8),
    "looped": ("llama-tiny", "pp=2,mb=1,schedule=looped-bfs", 2, 5),
    "zb-h1": ("llama-tiny", "pp=3,mb=1,schedule=zb-h1,zero=1,dp=2", 6, 8),
    "zb-v": ("gpt2-tiny", "pp=2,mb=1,schedule=zb-v,dp=2", 4, 8),
    "dualpipe-v": ("gpt2-tiny", "pp=2,mb=1,schedule=dualpipe-v,tp=2", 4, 6),
    "encoder": ("bert-tiny", "pp=3,tp=2,mb=1", 6, 4),
}
"""Model, plan, ranks and global batch."""


@cache
def graph_of(model: str) -> ModelGraph:
    return capture(load_model(model, tokenizer_vocab=263), sequence=SEQUENCE, dtype="float32")


@cache
def program_of(name: str) -> Program:
    model, shorthand, num_ranks, global_batch = CASES[name]
    graph = graph_of(model)
    plan = complete(
        parse_request(shorthand), graph, num_ranks=num_ranks, global_batch=global_batch, sequence=SEQUENCE
    )
    return lower(graph, plan)
