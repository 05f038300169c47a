"""``StateEntry``: which part of a global tensor lies in a rank's memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from shardstage.layout import Placement
from shardstage.layout.boxes import Box, boxes, local_shape, row_major_strides

__all__ = ["StateEntry"]


@dataclass(frozen=True, kw_only=True, eq=False)
class StateEntry:
    """A part of the global tensor ``key``, held in ``tensor``: contiguous, local [n-D] or flat [1-D].

    Along tp the global tensor lies by ``placement``, and this is the part of ``tp_rank``; of its row-major elements ``tensor`` holds
    those of ``flat_range`` (a flat shard of ZeRO, rows of FSDP), or all. Keys are ``model.<fqn>``, ``optimizer.exp_avg.<fqn>`` and so
    on: ranks that hold the same elements use the same key, and they are written once.
    """

    key: str
    tensor: Tensor
    global_shape: tuple[int, ...]
    placement: Placement
    tp_rank: int
    flat_range: tuple[int, int] | None = None

    def views(self) -> Iterator[tuple[Box, Tensor]]:
        """The boxes of the global tensor, each with the memory that holds it. Raises ValueError where ``tensor`` has another size."""
        found = boxes(self.global_shape, self.placement, self.tp_rank, self.flat_range)
        num_held = sum(box.numel for box, _ in found)
        if num_held != self.tensor.numel():
            raise ValueError(
                f"{self.key}: the tensor holds {self.tensor.numel()} elements, its range {num_held}"
            )
        flat = self.tensor.detach().view(-1)
        strides = row_major_strides(local_shape(self.global_shape, self.placement, self.tp_rank))
        for box, start in found:
            yield box, flat.as_strided(box.sizes, strides, flat.storage_offset() + start)
