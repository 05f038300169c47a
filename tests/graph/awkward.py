"""Models that cannot be one flat list of operators: they look at their own values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shardstage.graph.source import ModelSource
from shardstage.graph.tasks import causal_task


class Gate(nn.Module):
    """Skips its layer where the input is small: control flow that depends on data."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)
        self.register_buffer("num_calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.num_calls += 1
        if x.abs().sum() > 0.1:
            return x + torch.tanh(self.layer(x))
        return x


class Plain(nn.Sequential):
    """Nothing awkward at all."""

    def __init__(self) -> None:
        super().__init__(nn.Embedding(20, 8), nn.Linear(8, 20))


class Stack(nn.Module):
    """An embedding, blocks in a ModuleList, and a head that is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList([Gate(8), nn.Sequential(nn.Linear(8, 8), nn.GELU()), Gate(8)])
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Tangle(nn.Module):
    """One block whose second call reads both of the others: no chain."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.parts = nn.ModuleList([Gate(8), Gate(8)])
        self.head = nn.Linear(8, 20)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        first = self.parts[0](x)
        return self.head(self.parts[1](x + first) + first)


def sequential() -> nn.Module:
    return nn.Sequential(nn.Embedding(20, 8), Gate(8), nn.Linear(8, 20))


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)

    def forward(self, input_ids: Tensor) -> Tensor:
        raise ZeroDivisionError("no model at all")


def awkward(name: str) -> ModelSource:
    factories = {"stack": Stack, "sequential": sequential, "tangle": Tangle, "broken": Broken}
    return ModelSource(name=name, factory=factories[name], task=causal_task(20), vocab_size=20)
