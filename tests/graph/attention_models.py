"""Two layers of attention whose values have fewer features than queries and keys, as DeepSeek's: a model to add up kept bytes by hand."""

from __future__ import annotations

from functools import cache

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from shardstage.graph import ModelGraph
from shardstage.graph.capture import capture
from shardstage.graph.source import ModelSource
from shardstage.graph.tasks import causal_task

__all__ = ["attention_graph", "attention_source", "kept_of_attention"]

HIDDEN, VOCAB, HEADS, KEY, VALUE = 16, 50, 2, 24, 16


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(HIDDEN, HEADS * KEY, bias=False)
        self.key = nn.Linear(HIDDEN, HEADS * KEY, bias=False)
        self.value = nn.Linear(HIDDEN, HEADS * VALUE, bias=False)
        self.out = nn.Linear(HEADS * VALUE, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            each(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in (self.query, self.key, self.value)
        )
        found = scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(found.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]  # modules return Any


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(_Layer() for _ in range(2))
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)  # type: ignore[no-any-return]  # modules return Any


def attention_source() -> ModelSource:
    return ModelSource(name="attention", factory=_Model, task=causal_task(VOCAB), vocab_size=VOCAB)


@cache
def attention_graph(dtype: str) -> ModelGraph:
    return capture(attention_source(), sequence=32, dtype=dtype)


def kept_of_attention(dtype: str, num_rows: int) -> int:
    """By hand, on a GPU: of each of two layers x, which three products read, their results q, k and v, attention's own, which the last
    product reads, and a float32 number a row of each head; of the model the last x and the loss's log-softmax in float32."""
    width = 4 if dtype == "float32" else 2
    layer = width * (HIDDEN + 2 * HEADS * KEY + 2 * HEADS * VALUE) + 4 * HEADS
    return num_rows * (2 * layer + width * HIDDEN + 4 * VOCAB)
