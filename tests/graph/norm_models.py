"""Two layers with torch's own norm: a small model whose kept bytes can be added up by hand."""

from __future__ import annotations

from functools import cache

from torch import Tensor, nn

from shardstage.graph import ModelGraph
from shardstage.graph.capture import capture
from shardstage.graph.source import ModelSource
from shardstage.graph.tasks import causal_task

__all__ = ["HIDDEN", "VOCAB", "kept_bytes", "norm_graph", "norm_source"]

HIDDEN, VOCAB = 16, 50


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(HIDDEN)
        self.linear = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x))  # type: ignore[no-any-return]  # modules return Any


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(_Layer() for _ in range(2))
        self.norm = nn.RMSNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]  # modules return Any


def norm_source() -> ModelSource:
    return ModelSource(name="norms", factory=_Model, task=causal_task(VOCAB), vocab_size=VOCAB)


@cache
def norm_graph(dtype: str) -> ModelGraph:
    return capture(norm_source(), sequence=32, dtype=dtype)


def kept_bytes(dtype: str, device_kind: str, num_rows: int) -> int:
    """By hand: three norms with the product that reads each one's result, and the loss's log-softmax in float32.

    cuda    x                                 a number a row in float32    the result
    cpu     x in float32, x / rms in float32  a number a row in float32    the result
    """
    width = 4 if dtype == "float32" else 2
    kept = width * HIDDEN if device_kind == "cuda" else 2 * 4 * HIDDEN
    return num_rows * (3 * (kept + 4 + width * HIDDEN) + 4 * VOCAB)
