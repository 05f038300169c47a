"""``Parts``: what the seconds of a step go to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from shardstage.cost.profile import Recompute, UnitCost

__all__ = ["Parts", "compute_parts"]


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

    def times(self, count: int) -> Parts:
        return Parts(*(count * seconds for seconds in self))


def compute_parts(units: Sequence[UnitCost], recompute: Recompute) -> Parts:
    """What one microbatch takes forward, backward and computed again: products, memory, host and tp.

    What is computed again leaves out products only.
    """
    total = Parts()
    for unit in units:
        (memory_s, again_memory_s), (host_s, again_host_s) = _both(unit.memory_s), _both(unit.host_s)
        forward_talk_s = unit.talk_s(forward=True)
        talk_s = forward_talk_s + unit.talk_s(forward=False)
        products_s = unit.forward_s + unit.backward_s - memory_s - host_s
        total = total.plus(Parts(products=products_s, memory=memory_s, host=host_s, tp=talk_s))
        again_s = unit.kept[recompute].recompute_s
        if again_s:
            left_s = max(0.0, again_s - again_memory_s - unit.tp_forward_s)
            again_host_s = min(again_host_s, left_s)
            total = total.plus(
                Parts(
                    left_s - again_host_s,
                    again_s - left_s - unit.tp_forward_s,
                    again_host_s,
                    unit.tp_forward_s,
                )
            )
    return total


def _both(ways: tuple[float, float]) -> tuple[float, float]:
    """Forward and backward together, and the forward alone, which is what is computed again."""
    return sum(ways), ways[0]
