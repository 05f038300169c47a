"""``Accounting``: how a framework stores what a plan says it must hold, as far as the memory of a rank depends on it.

The default is what our engine does. Others serve to hold predictions against runs of other frameworks (benchmarks/planner/memory): each
field is a fact that can be read in a framework's code, never a number fitted to its memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["OUR_ACCOUNTING", "Accounting", "LossBytes"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LossBytes:
    """What the last unit, with the loss, keeps of a microbatch until its backward, and the most that its backward adds to that."""

    kept_bytes: int
    transient_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Accounting:
    """State and buffers of one rank.

    ``gradient_bytes``: of one element of a gradient between the microbatches' backwards; None: as wide as the master weights.
    ``copies_reduced_part``: ZeRO-1 has its part of the reduced gradient beside the whole one, and a copy of a bucket's part that it
    gathers from. ``num_posted_receives``: buffers of receives that are posted ahead. ``has_own_receives``: what a stage received is kept
    in a buffer of its own, not as what its first unit saves. ``keeps_sent``: what a stage sent is kept until its backward.
    ``update_bytes``: what the optimizer's step allocates for each element of the rank's part when no activation lives.
    ``bucket_bytes``: a copy of gradients that are reduced after the last backward, when no activation lives.
    ``loss``: the last unit where the framework's loss is not the graph's. ``fixed_bytes``: workspaces and constants that live in the
    allocator all the time; ``context_bytes``: what the device's driver and its communication library hold outside of it.
    ``reserved_ratio``: bytes that the allocator takes from the device for each byte allocated at the peak.
    """

    gradient_bytes: int | None = None
    copies_reduced_part: bool = True
    num_posted_receives: int = 2
    has_own_receives: bool = True
    keeps_sent: bool = False
    update_bytes: float = 0.0
    bucket_bytes: int = 0
    loss: LossBytes | None = None
    fixed_bytes: int = 0
    context_bytes: int = 0
    reserved_ratio: float = 1.0

    def device_bytes(self, allocated_bytes: int) -> int:
        """What the device must have for a rank that allocates so much at its peak."""
        return round(allocated_bytes * self.reserved_ratio) + self.context_bytes


OUR_ACCOUNTING: Final = Accounting()
