"""Plans that recompute beside the same plans without: a part of a stage's layers, or named modules of them, under any axis."""

from __future__ import annotations

import json
from pathlib import Path

from tests.runtime.engine_entries import GLOBAL_BATCH, SEQUENCE, Case

from shardstage.graph.capture import capture
from shardstage.graph.source import load_model
from shardstage.plan import check, complete, parse_request

SEVEN_LAYERS = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 259,
    "n_embd": 45,
    "n_layer": 7,
    "n_head": 5,
    "n_positions": 16,
}
RECOMPUTING = {
    "pp=3,mb=2,schedule=zb-h1": (
        "stages=full:1+selective/selective:2/full:1+selective:1",
        "stages=full:1+selective/selective:2/full:1+selective:1,modules=*.mlp/*.ln_2",
    ),
    "tp=3,sp,mb=3": (
        "recompute=full:3+selective:2",
        "recompute=selective,modules=*.attn/*.ln_?/*.act/*.dropout",
    ),
    "dp=3,mb=3,shares=3/2/1,zero=3": ("recompute=full:4", "recompute=selective:5,modules=*.mlp/*.attn"),
}


def recompute_cases(folder: Path) -> dict[str, Case]:
    """Each plan by its shorthand, for seven layers with dropout on three ranks; the model's configuration is written into the folder."""
    model = folder / "config.json"
    model.write_text(json.dumps(SEVEN_LAYERS))
    graph = capture(load_model(str(model)), sequence=SEQUENCE, dtype="float32")

    def case_of(text: str) -> Case:
        plan = complete(parse_request(text), graph, num_ranks=3, global_batch=GLOBAL_BATCH, sequence=SEQUENCE)
        check(plan, graph, num_ranks=3)
        return Case(str(model), graph, plan)

    texts = [text for plain, more in RECOMPUTING.items() for text in (plain, *(f"{plain},{m}" for m in more))]
    return {text: case_of(text) for text in texts}
