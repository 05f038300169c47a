"""Nine families of models, small: six of transformers, three of plain torch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from shardstage.graph.source import BUILT_IN, ModelSource, load_model
from shardstage.graph.tasks import batch_task, causal_task, image_task


class ResidualBlock(nn.Module):
    """Two convolutions around a shortcut; the sum and the activations are made in place."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.relu = nn.ReLU(inplace=True)
        shortcut = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
        )
        self.shortcut = shortcut if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += self.shortcut(x)
        return self.relu(y)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.layer1 = nn.Sequential(ResidualBlock(8, 8, 1), ResidualBlock(8, 8, 1))
        self.layer2 = nn.Sequential(ResidualBlock(8, 16, 2), ResidualBlock(16, 16, 1))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer2(self.layer1(self.stem(x))).mean((2, 3)))


class UNet(nn.Module):
    """Two levels, skip connections by concatenation, transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = _double_conv(3, 8)
        self.down2 = _double_conv(8, 16)
        self.bottom = _double_conv(16, 32)
        self.rise2 = nn.ConvTranspose2d(32, 16, 2, 2)
        self.up2 = _double_conv(32, 16)
        self.rise1 = nn.ConvTranspose2d(16, 8, 2, 2)
        self.up1 = _double_conv(16, 8)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        bottom = self.bottom(F.max_pool2d(two, 2))
        y = self.up2(torch.cat((two, self.rise2(bottom)), 1))
        y = self.up1(torch.cat((one, self.rise1(y)), 1))
        return self.head(y)


class LSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.lstm = nn.LSTM(16, 24, 2, batch_first=True, dropout=0.1)
        self.head = nn.Linear(24, 50)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(input_ids))[0])


def segmentation_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Summed over pixels."""
    return F.cross_entropy(model(batch["image"]), batch["label"], reduction="sum")


def _double_conv(channels_in: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, padding=1),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels_out, channels_out, 3, padding=1),
        nn.GroupNorm(2, channels_out),
        nn.ReLU(),
    )


PLAIN: Mapping[str, Callable[[], ModelSource]] = {
    "resnet": lambda: ModelSource(
        name="resnet", factory=ResNet, task=image_task(image_size=(16, 16), num_channels=3, num_classes=10)
    ),
    "unet": lambda: ModelSource(
        name="unet",
        factory=UNet,
        task=batch_task(
            segmentation_loss,
            {"image": torch.empty(1, 3, 16, 16), "label": torch.empty(1, 16, 16, dtype=torch.int64)},
        ),
    ),
    "lstm": lambda: ModelSource(name="lstm", factory=LSTM, task=causal_task(50), vocab_size=50),
}
FAMILIES = (*(name for name in BUILT_IN if name != "llama-small"), *PLAIN)


def source_of(family: str) -> ModelSource:
    return PLAIN[family]() if family in PLAIN else two_layers_of(family)


def two_layers_of(name: str) -> ModelSource:
    source = load_model(name)
    config = copy.deepcopy(source.hf_config)
    config.num_hidden_layers = 2
    if hasattr(config, "num_decoder_layers"):
        config.num_decoder_layers = 2
    model_class = getattr(transformers, BUILT_IN[name][1])
    return replace(source, factory=partial(model_class, config), hf_config=config)
