"""``Execution``: how a framework runs a plan, as far as the time of a step depends on it.

The default is what our engine does. Others serve to hold predictions against runs of other frameworks (benchmarks/planner): each field
is a fact that can be read in a framework's code.
"""

from __future__ import annotations

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
    """

    accumulation_bytes: float | None = None
    wire_bytes: float | None = None
    update_bytes: float | None = None
    overlaps_gradients: bool = True
    overlaps_sends: bool = True
    scatters_sends: bool = False


OURS: Final = Execution()
