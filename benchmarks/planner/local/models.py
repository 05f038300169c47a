"""The three models: unmodified classes of ``transformers``, each of another character."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardstage.graph import ModelGraph
from shardstage.graph.capture import capture
from shardstage.graph.source import load_model

__all__ = ["MODELS", "Workload", "captured", "write_config"]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model and its batch; ``sequence`` is None for one that reads images."""

    name: str
    what: str
    config: tuple[tuple[str, Any], ...]
    sequence: int | None
    global_batch: int


def write_config(workload: Workload, folder: Path) -> str:
    """The path of the model's configuration, as ``load_model`` reads it."""
    path = folder / workload.name / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(dict(workload.config)))
    return str(path)


def captured(workload: Workload, spec: str) -> ModelGraph:
    return capture(load_model(spec), sequence=workload.sequence)


def _llama() -> Workload:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 10,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 2048,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "use_cache": False,
    }
    return Workload(
        name="llama",
        what="narrow and deep: Llama, 10 layers, hidden 192, vocabulary 2,048",
        config=tuple(config.items()),
        sequence=96,
        global_batch=16,
    )


def _gpt() -> Workload:
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": 384,
        "n_layer": 2,
        "n_head": 6,
        "n_positions": 256,
        "vocab_size": 12288,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "use_cache": False,
    }
    return Workload(
        name="gpt",
        what="wide and shallow: GPT-2, 2 layers, hidden 384, tied vocabulary of 12,288",
        config=tuple(config.items()),
        sequence=64,
        global_batch=16,
    )


def _vit() -> Workload:
    config = {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "image_size": 96,
        "patch_size": 8,
        "hidden_size": 192,
        "num_hidden_layers": 6,
        "num_attention_heads": 3,
        "intermediate_size": 768,
        "id2label": {str(number): str(number) for number in range(100)},
    }
    return Workload(
        name="vit",
        what="an encoder of images: ViT, 6 layers, hidden 192, 3 heads, 145 positions",
        config=tuple(config.items()),
        sequence=None,
        global_batch=16,
    )


MODELS = {workload.name: workload for workload in (_llama(), _gpt(), _vit())}
