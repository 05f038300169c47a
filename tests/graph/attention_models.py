"""Two layers of attention that a CPU and a GPU compute by unlike kernels: kept bytes can be added up by hand.

``latent``: values have fewer features than queries and keys, as DeepSeek's have. ``grouped``: two query heads share a key, as Llama's do.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Literal

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from shardstage.graph import ModelGraph
from shardstage.graph.capture import capture
from shardstage.graph.source import ModelSource
from shardstage.graph.tasks import causal_task

__all__ = ["KEY_HEADS", "Form", "attention_graph", "attention_source", "kept_of_attention"]

HIDDEN, VOCAB, HEADS, KEY = 16, 50, 2, 24
Form = Literal["latent", "grouped"]
KEY_HEADS: dict[Form, int] = {"latent": 2, "grouped": 1}
VALUE: dict[Form, int] = {"latent": 16, "grouped": 24}


class _Layer(nn.Module):
    def __init__(self, form: Form) -> None:
        super().__init__()
        self.is_grouped = form == "grouped"
        self.query = nn.Linear(HIDDEN, HEADS * KEY, bias=False)
        self.key = nn.Linear(HIDDEN, KEY_HEADS[form] * KEY, bias=False)
        self.value = nn.Linear(HIDDEN, KEY_HEADS[form] * VALUE[form], bias=False)
        self.out = nn.Linear(HEADS * VALUE[form], HIDDEN, bias=False)
        self.features = KEY, KEY, VALUE[form]

    def forward(self, x: Tensor) -> Tensor:
        made = zip((self.query, self.key, self.value), self.features, strict=True)
        q, k, v = (each(x).unflatten(-1, (-1, features)).transpose(1, 2) for each, features in made)
        found = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.is_grouped)
        mixed: Tensor = self.out(found.transpose(1, 2).flatten(-2))
        return x + mixed


class _Model(nn.Module):
    def __init__(self, form: Form) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(_Layer(form) for _ in range(2))
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(x)
        return logits


def attention_source(form: Form = "latent") -> ModelSource:
    return ModelSource(name=form, factory=partial(_Model, form), task=causal_task(VOCAB), vocab_size=VOCAB)


@cache
def attention_graph(dtype: str, form: Form = "latent") -> ModelGraph:
    return capture(attention_source(form), sequence=32, dtype=dtype)


def kept_of_attention(dtype: str, *, num_samples: int, sequence: int, form: Form = "latent") -> int:
    """By hand, on a GPU: of each of two layers x, which three products read, and what attention keeps; of the model the last x and the
    loss's log-softmax in float32.

    kernel         q, k and v as they are, its result, which the last product reads, a float32 number a row of each head
    written out    q, k and v for each query head and probabilities in float32, and the result for the last product
    """
    width, heads = (4 if dtype == "float32" else 2), KEY_HEADS[form]
    result = width * HEADS * VALUE[form]
    if form == "grouped" and dtype == "float32":
        attention = 4 * HEADS * (2 * KEY + VALUE[form] + sequence) + result
    else:
        attention = width * (HEADS * KEY + heads * (KEY + VALUE[form])) + result + 4 * HEADS
    return num_samples * sequence * (2 * (width * HIDDEN + attention) + width * HIDDEN + 4 * VOCAB)
