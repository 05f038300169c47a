"""Operators of real models on devices: line, contiguous, free and bound; the last table of README.md.

PYTHONPATH=src python benchmarks/planner/placement/models.py
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from shardstage.cluster import load
from shardstage.graph import ModelGraph
from shardstage.graph.capture import capture
from shardstage.graph.tasks import batch_task
from shardstage.planner.placement import place_model

CLUSTERS = ("h100:8", "cpu:4")


def clip() -> ModelGraph:
    """CLIP ViT-B/32: an image tower of 12 layers of 768, a text tower of 12 layers of 512; 32 pairs."""

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        logits = model(**batch).logits_per_text
        return F.cross_entropy(logits, torch.arange(len(logits)), reduction="sum")

    with torch.device("meta"):
        model = CLIPModel(CLIPConfig())
    batch = {
        "input_ids": torch.full((32, 77), 3, device="meta"),
        "pixel_values": torch.zeros(32, 3, 224, 224, device="meta"),
    }
    return capture(model, task=batch_task(loss, batch), microbatch=32, sequence=77)


def t5() -> ModelGraph:
    """T5-small: 6 and 6 layers of 512, one embedding for encoder, decoder and head; 8 samples of 512 tokens."""
    config = T5Config(num_layers=6, num_decoder_layers=6)
    return capture(lambda: T5ForConditionalGeneration(config), sequence=512).at(microbatch=8, sequence=512)


def llama() -> ModelGraph:
    """Llama of 16 layers of 2,048 (Llama-3.2-1B): a chain; 1 sample of 2,048 tokens."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    return capture(lambda: LlamaForCausalLM(config), sequence=2048).at(microbatch=1, sequence=2048)


def main() -> None:
    print(
        "| model | cluster | devices | ops | nodes | line (ms) | contiguous | free | bound | free over line |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, make in (("CLIP ViT-B/32", clip), ("T5-small", t5), ("Llama 1B", llama)):
        graph = make()
        for cluster in CLUSTERS:
            for num_devices in (2, 4):
                print(row(name, graph, cluster, num_devices), flush=True)


def row(name: str, graph: ModelGraph, cluster: str, num_devices: int) -> str:
    found = place_model(
        graph,
        load(cluster),
        num_devices=num_devices,
        microbatch=graph.microbatch,
        sequence=graph.sequence,
        memory_limit_bytes=float("inf"),
    )
    times = (
        found.line.stage_time_s,
        found.contiguous.stage_time_s,
        found.free.stage_time_s,
        found.free.lower_bound_s,
    )
    ms = " | ".join(f"{1e3 * seconds:.3f}" for seconds in times)
    size = f"{len(graph.ops)} | {found.ops.placement.num_nodes}"
    return f"| {name} | {cluster} | {num_devices} | {size} | {ms} | {100 * found.gain_ratio:.1f} % |"


if __name__ == "__main__":
    main()
