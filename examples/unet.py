"""A U-Net of plain PyTorch for images of any content: what a model of your own looks like to Shardstage.

shardstage prove --model examples/unet.py:unet --ranks 3 --plan "pp=3" --batch 6

``unet`` says how the model is built, what a batch holds and how both become one summed loss; the model itself knows nothing of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardstage.graph.source import ModelSource
from shardstage.graph.tasks import batch_task

NUM_CLASSES = 5


class Double(nn.Module):
    """Two convolutions, each normalised over groups of channels: statistics of a sample alone, whatever the microbatch."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(num_in, num_out, 3, padding=1)
        self.first_norm = nn.GroupNorm(4, num_out)
        self.second = nn.Conv2d(num_out, num_out, 3, padding=1)
        self.second_norm = nn.GroupNorm(4, num_out)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.first_norm(self.first(x)))
        return F.silu(self.second_norm(self.second(x)))


class UNet(nn.Module):
    """Images [b, 3, h, w] → class scores [b, classes, h, w]; each level down is kept for the level up beside it.

    down 0 ───────────────────▶ up 0
      down 1 ───────────▶ up 1
             bottom
    """

    def __init__(self, width: int = 16, num_levels: int = 2) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(num_levels + 1)]
        self.downs = nn.ModuleList(
            Double(before, after) for before, after in zip([3, *widths], widths[:-1], strict=False)
        )
        self.bottom = Double(widths[-2], widths[-1])
        self.rises = nn.ModuleList(
            nn.ConvTranspose2d(wide, narrow, 2, stride=2)
            for wide, narrow in zip(reversed(widths[1:]), reversed(widths[:-1]), strict=True)
        )
        self.ups = nn.ModuleList(Double(2 * narrow, narrow) for narrow in reversed(widths[:-1]))
        self.head = nn.Conv2d(width, NUM_CLASSES, 1)

    def forward(self, image: Tensor) -> Tensor:
        x, kept = image, []
        for down in self.downs:
            x = down(x)
            kept.append(x)
            x = F.max_pool2d(x, 2)
        x = self.bottom(x)
        for rise, up in zip(self.rises, self.ups, strict=True):
            x = up(torch.cat([kept.pop(), rise(x)], dim=1))
        scores: Tensor = self.head(x)
        return scores


def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The sum over samples of the mean over a sample's pixels."""
    scores = model(batch["image"])
    by_pixel = F.cross_entropy(scores, batch["classes"], reduction="none")
    return by_pixel.flatten(1).mean(1).sum()


unet = ModelSource(
    name="unet",
    factory=UNet,
    task=batch_task(
        loss,
        {"image": torch.zeros(2, 3, 32, 32), "classes": torch.zeros(2, 32, 32, dtype=torch.int64)},
    ),
)
