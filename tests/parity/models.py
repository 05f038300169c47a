"""Small unmodified models for proofs, as a user's own factories name them.

transformers is imported only by what needs it: ranks that do not start 2 s earlier.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardstage.graph import ModelGraph
from shardstage.graph.capture import capture
from shardstage.plan import complete, parse_request
from shardstage.training.job import TrainJob, source_of
from shardstage.training.run_config import RunConfig

__all__ = ["Decoder", "Encoder", "bert", "decoder", "encoder", "gpt2", "job_of", "llama"]

SEQUENCE = 16


def llama() -> nn.Module:
    """Grouped heads, rotary positions, norms in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=260,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    )


def gpt2() -> nn.Module:
    """Tied embeddings, fused projections, dropout in three places."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=260, n_positions=64, n_embd=32, n_layer=2, n_head=4))


def bert() -> nn.Module:
    """Tied embeddings with a bias of their own, dropout, a key bias whose gradient is zero but for rounding."""
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(
        BertConfig(
            vocab_size=260,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=64,
        )
    )


class _Layer(nn.Module):
    """Attention and a gated product, each dropped and added to what came in."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up, self.gate = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm(x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*heads.unbind(0), dropout_p=0.1, is_causal=True)
        x = x + F.dropout(self.out(mixed.transpose(1, 2).flatten(2)), 0.1, self.training)
        gated = self.up(x) * F.softmax(self.gate(x), dim=-1, dtype=torch.float32).to(x.dtype)
        return x + F.dropout(self.down(gated), 0.1, self.training)


class Decoder(nn.Module):
    """A decoder in plain PyTorch with tied embeddings."""

    def __init__(self, width: int = 32, num_heads: int = 4, num_layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(260, width)
        self.layers = nn.ModuleList(_Layer(width, num_heads) for _ in range(num_layers))
        self.head = nn.Linear(width, 260, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        scores: Tensor = self.head(x * self.scale)
        return scores.float()


def decoder() -> nn.Module:
    return Decoder()


class Encoder(nn.Module):
    """PyTorch's own layer, whose dropouts are called from within ``torch.nn.functional``."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(260, 32)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 4, 48, dropout=0.2, batch_first=True) for _ in range(2)
        )
        self.head = nn.Linear(32, 260)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        scores: Tensor = self.head(x)
        return scores


def encoder() -> nn.Module:
    return Encoder()


def job_of(
    model: str,
    folder: Path,
    *,
    plan: str = "dp=1",
    ranks: int = 1,
    steps: int = 2,
    precision: str = "float32",
    graph: ModelGraph | None = None,
) -> TrainJob:
    """A job of 4 samples of 16 tokens a step; ``graph`` saves a capture."""
    config = RunConfig(
        model=f"{__file__}:{model}",
        plan=plan,
        ranks=ranks,
        steps=steps,
        global_batch=4,
        precision=precision,  # type: ignore[arg-type]
    ).with_changes(**{"data.paths": (__file__,), "data.sequence": SEQUENCE, "optimizer.lr": 1e-3})
    source = source_of(config)
    config = config.with_changes(**{"data.objective": source.task.objective})
    graph = graph or capture(source, sequence=SEQUENCE, dtype=precision)
    chosen = complete(
        parse_request(plan),
        graph,
        num_ranks=ranks,
        global_batch=4,
        sequence=SEQUENCE,
        precision=precision,  # type: ignore[arg-type]
    )
    return TrainJob(config=config, graph=graph, plan=chosen, folder=str(folder))
