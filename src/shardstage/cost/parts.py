"""``Parts``: what the seconds of a step go to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from shardstage.cost.profile import UnitCost
from shardstage.graph.recompute import Recompute

__all__ = ["Parts", "cause_of_axis", "compute_parts"]


class Parts(NamedTuple):
    """Seconds by cause, in the order of ``cluster.CAUSES``.

    ``products`` are matrix products and attention, ``memory`` kernels bound by memory and the optimizer, ``host`` what launching adds,
    ``tp`` what compute waits for in its midst (the axes tp, cp and ep), ``dp`` waiting for gradients and parameters, ``pp`` the pipeline's
    bubble and transfers.
    """

    products: float = 0.0
    memory: float = 0.0
    host: float = 0.0
    tp: float = 0.0
    dp: float = 0.0
    pp: float = 0.0

    def plus(self, other: Parts) -> Parts:
        return Parts(*(mine + more for mine, more in zip(self, other, strict=True)))

    def times(self, count: float) -> Parts:
        return Parts(*(count * seconds for seconds in self))


def cause_of_axis(axis: str) -> Literal["tp", "dp"]:
    """What waiting for a collective along an axis is booked under: all that is not in compute's midst under dp, with sums of ties
    (``tie0+3``) and of the norm (``world``)."""
    return "tp" if axis in ("tp", "cp", "ep") else "dp"


def compute_parts(units: Sequence[UnitCost], modes: Sequence[Recompute]) -> Parts:
    """What one microbatch takes forward, backward and computed again: products, memory, host and tp.

    ``modes`` say what of each unit is computed again: the forward but for some products; of these and the host it keeps the forward's
    proportion.
    """
    total = Parts()
    for unit, mode in zip(units, modes, strict=True):
        talk_s = (unit.talk_s(forward=True), unit.talk_s(forward=False))
        memory_s, host_s = sum(unit.memory_s), sum(unit.host_s)
        products_s = max(0.0, unit.forward_s + unit.backward_s - memory_s - host_s)
        total = total.plus(Parts(products_s, memory_s, host_s, sum(talk_s)))
        if again_s := unit.kept[mode].recompute_s:
            rest_s = max(0.0, again_s - unit.memory_s[0] - talk_s[0])
            launched_s = unit.forward_s - unit.memory_s[0]  # products and host in the forward
            again_host_s = rest_s * unit.host_s[0] / launched_s if launched_s > 0 else 0.0
            total = total.plus(Parts(rest_s - again_host_s, unit.memory_s[0], again_host_s, talk_s[0]))
    return total
