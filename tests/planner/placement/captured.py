"""Small models to place: two towers whose layers take turns, tables, statistics changed in place, and a tiny CLIP."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardstage import capture
from shardstage.graph import ModelGraph
from shardstage.graph.tasks import batch_task

WIDTH = 256


class Towers(nn.Module):
    """Two stacks of layers over the same input, written layer by layer, whose results are multiplied."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.left = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(num_layers))
        self.right = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        a = b = x
        for left, right in zip(self.left, self.right, strict=True):
            a, b = left(a), right(b)
        return a * b


class Tables(nn.Module):
    """Both layers add the same table, which follows from nothing but its size."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        table = torch.arange(WIDTH, device=x.device).sin()
        heads = (self.first(x) + table).view(-1, 2, WIDTH // 2).transpose(0, 1)
        left, right = heads.unbind(0)
        return self.second(torch.cat([left, right], dim=-1).relu()) + table


class UsesTwice(nn.Module):
    """Layers of two products with the same matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Twice() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.weight).relu(), self.weight)


class NormedTwice(nn.Module):
    """One batch norm without weights before and after a layer: both calls change its running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH, affine=False)
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.norm(self.layer(self.norm(x)).relu())
        return found


def captured(model: nn.Module, rows: int = 8) -> ModelGraph:
    """The sum of the squares of what the model makes of ``rows`` samples."""

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        found: Tensor = model(batch["x"])
        return found.pow(2).sum()

    return capture(model, task=batch_task(loss, {"x": torch.zeros(rows, WIDTH)}), microbatch=rows)


def captured_clip() -> ModelGraph:
    """A text and an image tower of two layers each, four pairs."""
    from transformers import CLIPConfig, CLIPModel

    tower = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"vocab_size": 64, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 2}
    model = CLIPModel(
        CLIPConfig(
            text_config=tower | tokens,
            vision_config=tower | {"image_size": 32, "patch_size": 8},
            projection_dim=32,
        )
    )

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        logits = model(**batch).logits_per_text
        return F.cross_entropy(logits, torch.arange(len(logits)), reduction="sum")

    batch = {"input_ids": torch.full((4, 16), 3), "pixel_values": torch.zeros(4, 3, 32, 32)}
    return capture(model, task=batch_task(loss, batch), microbatch=4, sequence=16)
