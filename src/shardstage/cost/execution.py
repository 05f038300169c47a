"""``Execution``: how a framework runs a plan, as far as the time of a step depends on it.

The default is what our engine does. Others serve to hold predictions against runs of other frameworks (benchmarks/planner): each field
is a fact that can be read in a framework's code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

__all__ = ["OURS", "Execution"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Execution:
    """``accumulation_bytes`` are moved for each parameter element after each microbatch, to add its gradient to the sum; ``wire_bytes``
    is what an element of a gradient takes when it is reduced, ``update_bytes`` what the optimizer moves for each element that it owns.
    None stands for what follows from the plan's dtypes.

    ``overlaps_gradients``: the reduction of gradients runs beside the last backward. ``overlaps_sends``: a stage computes while its
    results travel. ``scatters_sends``: tensor-parallel ranks send a part each over the network and gather it inside the node.
    ``sums_ties_whole``: whatever the ZeRO, all of a tied parameter's gradient is summed between its stages.

    ZeRO-1: ``sums_whole``, gradients are all-reduced though a rank needs but its part; ``packing_bytes`` are moved for each of their
    elements to pack them for that and to unpack the sums; ``broadcasts_parameters``, each rank's new ones in a broadcast of their own.
    ZeRO-3: ``gathers_apart`` parameters of a block are gathered, and their gradients reduced, by a call each, whose parts the host
    copies one by one, rank by rank, while the device waits; recomputing gathers them once more. 0: a block travels in one call.
    Nothing is gathered ahead, beside compute, while ``live_elements`` of parameters are there.
    """

    accumulation_bytes: float | None = None
    wire_bytes: float | None = None
    update_bytes: float | None = None
    overlaps_gradients: bool = True
    overlaps_sends: bool = True
    scatters_sends: bool = False
    sums_ties_whole: bool = False
    sums_whole: bool = False
    packing_bytes: float = 0.0
    broadcasts_parameters: bool = False
    gathers_apart: int = 0
    live_elements: float = math.inf


OURS: Final = Execution()
