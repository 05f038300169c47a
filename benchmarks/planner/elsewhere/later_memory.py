"""Holds predicted memory against the published peaks of ``later_memory.toml``.

Usage: python benchmarks/planner/elsewhere/later_memory.py
"""

from __future__ import annotations

import statistics
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "memory"))

from cases import Case
from experts import priced
from megatron import loss_core
from published import rows, shape_of
from software import LITGPT

from shardstage.cluster import load
from shardstage.cost.accounting import Accounting, LossBytes
from shardstage.cost.memory import rank_memory
from shardstage.graph.capture import capture_short
from shardstage.graph.source import ModelSource
from shardstage.graph.tasks import batch_task
from shardstage.layout import Mesh
from shardstage.plan import complete, parse_request
from shardstage.planner import predict

GB = 10**9
BERT_TOKENS = 512
CONTEXT_MIB = 1343
LOGIT_BYTES = 4
"""litgpt's loss: bfloat16 logits, which the caller holds, and their log-softmax; as much again for the gradients of both."""


def main() -> None:
    found = tomllib.loads(Path(__file__).with_name("later_memory.toml").read_text(encoding="utf-8"))
    print("| run | measured | predicted | error |\n|---|---|---|---|")
    for runs in (litgpt, bert, moonlight):
        errors = []
        for run, measured, predicted in runs(found):
            errors.append(predicted / measured - 1)
            print(f"| {run} | {measured / GB:.2f} GB | {predicted / GB:.2f} GB | {errors[-1]:+.1%} |")
        sizes = [abs(error) for error in errors]
        print(
            f"\n{runs.__name__}: median of {len(sizes)} {statistics.median(sizes):.1%}, largest {max(sizes):.1%}\n"
        )


def litgpt(found: dict[str, Any]) -> Iterator[tuple[str, float, float]]:
    """Name, bytes measured and predicted of each run."""
    for run in found["group"][0]["run"]:
        model = {"tied_embeddings": False, **found["model"][run["model"]]}
        yield run["id"], run["gb"] * GB, _all_bfloat16(litgpt_case(run, model))


def litgpt_case(run: dict[str, Any], model: dict[str, Any]) -> Case:
    shape = replace(shape_of(model), layers=run.get("layers", model["layers"]))
    num_logits = run["microbatch"] * run["sequence"] * shape.vocab
    return Case(
        shape=shape,
        kernels=LITGPT.kernels,
        accounting=Accounting(
            gradient_bytes=2,
            loss=LossBytes(kept_bytes=LOGIT_BYTES * num_logits, transient_bytes=LOGIT_BYTES * num_logits),
        ),
        mesh=Mesh(dp=run["gpus"]),
        layers_of=(shape.layers,),
        sequence=run["sequence"],
        microbatch=run["microbatch"],
        num_microbatches=1,
        zero=run["zero"],
        recompute=run.get("recompute", "none"),
        schedule="1f1b",
        is_compiled=run.get("is_compiled", False),
    )


def _all_bfloat16(case: Case) -> int:
    """The model's, but that weights have no other masters than themselves, and moments are as wide."""
    (use,), setup = case.ranks(), case.setup()
    part = use.optimizer // (2 * setup.master_bytes)
    own = 2 * part if case.zero >= 2 else 0
    return use.total_bytes - use.optimizer - use.master + 2 * 2 * part + own


def bert(found: dict[str, Any]) -> Iterator[tuple[str, float, float]]:
    """The model as ``transformers`` has it with attention written out, captured, and a plan by its shorthand."""
    graph = capture_short(bert_large(), sequence=BERT_TOKENS, dtype="float32").unfold()
    for run in found["group"][1]["run"]:
        text = f"dp=1,mb={run['microbatch']},dtype=fp32"
        plan = complete(
            parse_request(f"{text},recompute=full" if run.get("recompute") else text),
            graph,
            num_ranks=1,
            global_batch=run["microbatch"] * run.get("num_microbatches", 1),
            sequence=BERT_TOKENS,
            precision="float32",
        )
        use = predict(graph, plan, load("a100-80:1")).ranks[0]
        yield f"BERT large, {run['id']}", (run["mib"] - CONTEXT_MIB) * 2**20, use.total_bytes


def bert_large() -> ModelSource:
    """24 layers and a head of two classes."""
    config = BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    config.num_labels, config._attn_implementation = 2, "eager"
    example = {
        "input_ids": torch.zeros(2, BERT_TOKENS, dtype=torch.int64),
        "labels": torch.zeros(2, dtype=torch.int64),
    }
    return ModelSource(
        name="bert",
        factory=lambda: BertForSequenceClassification(config),
        task=batch_task(_of_classes, example),
        vocab_size=config.vocab_size,
        max_sequence=BERT_TOKENS,
    )


def _of_classes(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(input_ids=batch["input_ids"]).logits, batch["labels"], reduction="sum")


def moonlight(found: dict[str, Any]) -> Iterator[tuple[str, float, float]]:
    """Megatron's, of the shared data, by both meanings of its GB: sums of gradients and moments in bfloat16, masters in float32, says its
    recipe (Megatron-Bridge src/megatron/bridge/recipes/moonlight/moonlight_16b.py, moonlight_16b_pretrain_config)."""
    row = next((row for row in rows("mbridge-skills-memory") if row["id"] == "mbskill-moonlight-none"), None)
    if row is None:
        return
    profile, setup, _ = priced(row)
    num_tokens = setup.microbatch * row["model"]["seq_len"]
    loss = loss_core(num_tokens, row["model"]["hidden"], row["model"]["vocab"] // setup.mesh.tp)
    accounting = Accounting(
        gradient_bytes=2,
        copies_reduced_part=False,
        num_posted_receives=1,
        has_own_receives=False,
        loss=loss,
    )
    use = rank_memory(profile, setup, 0, accounting)
    for name, unit in (("GB", GB), ("GiB", 2**30)):
        measured = row["measured"]["peak_mem_GB"] * unit
        yield f"Moonlight 16B, 8 H100, tp 2, ep 8, in {name}", measured, use.total_bytes - use.optimizer // 2


if __name__ == "__main__":
    main()
