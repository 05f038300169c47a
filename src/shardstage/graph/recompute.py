"""What a stage computes again in its backward: all its layers alike, or its first ones more than the others.

    none, selective, full    every layer (what each of these keeps: ``saved``)
    full:3                   the first three layers in full, the others not
    full:3+selective         the first three layers in full, the others selectively
    full:1+selective:2       the first in full, the next two selectively, the others not

A stage that has fewer layers than are counted recomputes all of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, get_args

from shardstage.graph.blocks import Block

__all__ = [
    "PartialRecompute",
    "Recompute",
    "StageRecompute",
    "block_modes",
    "counted",
    "is_selective",
    "layer_modes",
    "num_counted",
    "parse_recompute",
]

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PartialRecompute:
    """The first ``full`` layers are recomputed whole, the ``selective`` ones after them selectively; None: all the others."""

    full: int = 0
    selective: int | None = 0

    def __str__(self) -> str:
        parts = [f"full:{self.full}"] if self.full else []
        if self.selective != 0:
            parts.append("selective" if self.selective is None else f"selective:{self.selective}")
        return "+".join(parts)

    def mode(self, layer: int) -> Recompute:
        """Of the layer of this number within its stage."""
        if layer < self.full:
            return "full"
        return "selective" if self.selective is None or layer < self.full + self.selective else "none"


StageRecompute: TypeAlias = Recompute | PartialRecompute


def layer_modes(recompute: StageRecompute, layers: Sequence[int]) -> tuple[Recompute, ...]:
    """The mode of each consecutive part of a stage; ``layers`` names the layer that it belongs to, -1 outside of layers.

    What lies outside goes with the layer before it, or with the first: it is never recomputed, but what it keeps counts from there.
    """
    if not isinstance(recompute, PartialRecompute):
        return (recompute,) * len(layers)
    modes, number, before = [], -1, -1
    for layer in layers:
        if layer not in (-1, before):
            number, before = number + 1, layer
        modes.append(recompute.mode(max(0, number)))
    return tuple(modes)


def block_modes(recompute: StageRecompute, blocks: Sequence[Block]) -> tuple[Recompute, ...]:
    """The mode of each block of a stage: what is no layer is not recomputed."""
    modes = layer_modes(recompute, [n if block.is_layer else -1 for n, block in enumerate(blocks)])
    return tuple(mode if block.is_layer else "none" for mode, block in zip(modes, blocks, strict=True))


def counted(full: int, selective: int, num_layers: int) -> StageRecompute:
    """What a stage of so many layers recomputes, in the fewest words."""
    if full == num_layers > 0:
        return "full"
    if full == selective == 0:
        return "none"
    if full + selective < num_layers:
        return PartialRecompute(full=full, selective=selective)
    return PartialRecompute(full=full, selective=None) if full else "selective"


def is_selective(recompute: StageRecompute) -> bool:
    """Whether some layer is recomputed selectively."""
    if isinstance(recompute, PartialRecompute):
        return recompute.selective != 0
    return recompute == "selective"


def num_counted(recompute: StageRecompute) -> int:
    """How many layers are counted; 0 where all are alike."""
    return recompute.full + (recompute.selective or 0) if isinstance(recompute, PartialRecompute) else 0


def parse_recompute(text: str) -> StageRecompute | None:
    """What a text such as ``full:3`` says; None where it says nothing of the kind."""
    for mode in get_args(Recompute):
        if text == mode:
            return mode  # type: ignore[no-any-return]
    found = _PARTIAL.fullmatch(text)
    if found is None:
        return None
    full, rest, after, selective = found.groups()
    return PartialRecompute(
        full=int(full or 0), selective=None if rest and not after else int(after or selective or 0)
    )


_PARTIAL: Final = re.compile(r"full:([1-9]\d*)(\+selective(?::([1-9]\d*))?)?|selective:([1-9]\d*)", re.ASCII)
