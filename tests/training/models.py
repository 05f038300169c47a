"""A language model so small that the tests spend their time on the run around it; importable by every rank."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["TINY", "awkward", "tiny"]

TINY = f"{__file__}:tiny"


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.dropout(self.down(torch.relu(self.up(hidden))))


class TinyModel(nn.Module):
    """Predicts a byte from the one before it."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.embedding = nn.Embedding(260, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(3))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 260, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embedding(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        logits: Tensor = self.head(self.norm(hidden))
        return logits


def tiny() -> nn.Module:
    return TinyModel()


class Undecided(TinyModel):
    """Asks its activations what to do: no list of operators says that."""

    def forward(self, input_ids: Tensor) -> Tensor:
        logits = super().forward(input_ids)
        return logits if logits.sum() > 0 else 2 * logits


def awkward() -> nn.Module:
    return Undecided()
