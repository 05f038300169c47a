"""Small models of nine families, and others whose sizes no number of ranks divides, ready to run whole or sharded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from tests.graph.families import PLAIN
from tests.sharding.lockstep import Outcome, run_sharded
from torch import Tensor, nn

from shardstage.graph import ModelGraph
from shardstage.graph.capture import capture
from shardstage.graph.source import ModelSource, source_of_model
from shardstage.graph.tasks import causal_task
from shardstage.sharding import shard

MICROBATCH, SEQUENCE, VOCABULARY = 3, 7, 61
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A captured model in double precision, its weights, a batch, and what one device makes of them."""

    graph: ModelGraph
    state: Mapping[str, Tensor]
    batch: Mapping[str, Tensor]
    whole: Outcome


class Attention(nn.Module):
    """Grouped-query attention with a residual; q, k and v of their own."""

    def __init__(self, width: int, heads: int, groups: int) -> None:
        super().__init__()
        self.heads, self.groups = heads, groups
        self.q, self.out = nn.Linear(width, 4 * heads, bias=False), nn.Linear(4 * heads, width)
        self.k, self.v = nn.Linear(width, 4 * groups), nn.Linear(width, 4 * groups)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            self._heads(y, n)
            for y, n in ((self.q(x), self.heads), (self.k(x), self.groups), (self.v(x), self.groups))
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.groups)
        return x + self.out(y.transpose(1, 2).flatten(2))

    def _heads(self, y: Tensor, heads: int) -> Tensor:
        return y.view(*y.shape[:2], heads, 4).transpose(1, 2)


class FusedAttention(nn.Module):
    """Attention whose q, k and v come from one projection, laid out and taken apart in one of the usual ways."""

    def __init__(self, layout: str, heads: int = 5, head_size: int = 4) -> None:
        super().__init__()
        width = heads * head_size
        self.layout, self.heads, self.head_size = layout, heads, head_size
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._heads(self.qkv(self.norm(x)))  # [B, H, S, d]
        weights = torch.softmax(q @ k.transpose(-1, -2) / 2, -1)
        return x + self.out((weights @ v).transpose(1, 2).reshape(x.shape))

    def _heads(self, y: Tensor) -> tuple[Tensor, ...]:
        batch, length, width = *y.shape[:2], y.shape[2] // 3
        heads, size = self.heads, self.head_size
        match self.layout:
            case "unbound heads":  # [.., heads, 3, size]
                return tuple(t.transpose(1, 2) for t in y.view(batch, length, heads, 3, size).unbind(3))
            case "chunked heads":  # [.., heads, 3 * size]
                return tuple(t.transpose(1, 2) for t in y.view(batch, length, heads, 3 * size).chunk(3, -1))
            case "permuted sections":  # [.., 3, heads, size]
                return y.view(batch, length, 3, heads, size).permute(2, 0, 3, 1, 4).unbind(0)
            case "selected sections":
                z = y.reshape(batch, length, 3, heads, size)
                return tuple(z[:, :, i].transpose(1, 2) for i in range(3))
            case _:  # slices of [.., 3 * heads * size]
                parts = (y[..., i * width : (i + 1) * width] for i in range(3))
                return tuple(t.view(batch, length, heads, size).transpose(1, 2) for t in parts)


class GatedMLP(nn.Module):
    """A fused gate, and bare parameters that are used as they are and transposed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * 13), nn.Linear(13, width)
        self.left, self.right = (nn.Parameter(torch.randn(width, 11)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, -1)
        x = x + self.down(F.gelu(gate) * up)
        x = x + torch.tanh(x @ self.left) @ self.right.t()
        return x + F.linear(torch.relu(x @ self.left), self.right)


class LanguageModel(nn.Module):
    """Blocks between an embedding and an untied head."""

    def __init__(self, width: int, *blocks: nn.Module, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.embed, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary)
        self.blocks = nn.Sequential(*blocks)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(input_ids)))


def llama(heads: int, groups: int, *, width: int = 12, vocabulary: int = VOCABULARY) -> nn.Module:
    """Two layers; ``groups`` key-value heads of four elements, an MLP of ``width``."""
    config = transformers.LlamaConfig(
        hidden_size=4 * heads,
        head_dim=4,
        intermediate_size=width,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=vocabulary,
        **_TOKENS,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2(heads: int = 4) -> nn.Module:
    """Dropout of 0.1 throughout, head and embedding tied."""
    config = transformers.GPT2Config(
        n_embd=4 * heads,
        n_layer=2,
        n_head=heads,
        n_inner=13,
        vocab_size=VOCABULARY,
        n_positions=16,
        **_TOKENS,
    )
    return transformers.GPT2LMHeadModel(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=13,
        vocab_size=VOCABULARY,
    )
    return transformers.BertForMaskedLM(config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        d_model=16,
        d_kv=4,
        d_ff=13,
        num_layers=2,
        num_heads=4,
        vocab_size=VOCABULARY,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=13,
        image_size=8,
        patch_size=4,
        num_labels=10,
    )
    return transformers.ViTForImageClassification(config)


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        hidden_size=16,
        intermediate_size=13,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        vocab_size=VOCABULARY,
        **_TOKENS,
    )
    return transformers.MixtralForCausalLM(config)


FAMILIES: Mapping[str, Callable[[], nn.Module | ModelSource]] = {
    "llama": lambda: llama(4, 2),
    "gpt2": gpt2,
    "bert": bert,
    "t5": t5,
    "vit": vit,
    "mixtral": mixtral,
    **PLAIN,
}

FUSED_LAYOUTS = ("unbound heads", "chunked heads", "permuted sections", "selected sections", "slices")
HEADS_AND_GROUPS = ((10, 5), (6, 3), (5, 1), (2, 2), (1, 1))

UNEVEN: Mapping[str, Callable[[], nn.Module]] = {
    "heads and groups": lambda: LanguageModel(16, *(Attention(16, *sizes) for sizes in HEADS_AND_GROUPS)),
    "five fused heads": lambda: LanguageModel(20, *map(FusedAttention, FUSED_LAYOUTS), GatedMLP(20)),
    "five heads in a Conv1D": lambda: gpt2(5),
    "a vocabulary of 50,257": lambda: LanguageModel(4, vocabulary=50_257),
}


@cache
def case(name: str) -> Case:
    """The case of a name in one of the tables; captured once."""
    torch.manual_seed(0)
    made = (FAMILIES | UNEVEN)[name]()
    if isinstance(made, LanguageModel):
        made = source_of_model(made, task=causal_task(made.vocabulary))
    source = made if isinstance(made, ModelSource) else source_of_model(made)
    model = source.factory().double()
    graph = in_double(
        capture(model, microbatch=MICROBATCH, sequence=SEQUENCE, task=source.task, dtype="float64")
    )
    named = dict(model.named_parameters(remove_duplicate=False))
    state = {name: p.detach() + 0.05 * torch.randn_like(p) for name, p in named.items()}
    for tensors in _tied(model):
        state.update(dict.fromkeys(tensors, state[tensors[0]]))
    state |= dict(model.named_buffers(remove_duplicate=False))
    batch = _batch(source)
    return Case(
        graph=graph, state=state, batch=batch, whole=run_sharded(shard(graph, num_ranks=1), state, batch)
    )


def in_double(graph: ModelGraph) -> ModelGraph:
    """The graph without the model's own casts to single precision, which would bound how well two runs agree."""

    def widened(argument: Any) -> Any:
        if isinstance(argument, tuple):
            return tuple(map(widened, argument))
        return "float64" if argument == "float32" else argument

    ops = tuple(
        replace(op, args=widened(op.args), kwargs=tuple((key, widened(item)) for key, item in op.kwargs))
        for op in graph.ops
    )
    values = {name: replace(value, dtype=widened(value.dtype)) for name, value in graph.values.items()}
    return replace(graph, ops=ops, values=values)


def _tied(model: nn.Module) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _batch(source: ModelSource) -> dict[str, Tensor]:
    """Random, with the first two targets of the first sample ignored where there are several for a sample."""
    batch: dict[str, Tensor] = {}
    for name, like in source.task.example_batch(MICROBATCH, SEQUENCE).items():
        if like.is_floating_point():
            batch[name] = torch.randn(like.shape, dtype=torch.float64)
        else:
            batch[name] = torch.randint(0, 5, like.shape)
    labels = batch.get("labels")
    if labels is not None and labels.dim() == 2:
        labels[0, :2] = -100
    return batch
