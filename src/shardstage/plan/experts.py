"""``require_dealt``: refuses to deal out experts that a model does not have, or not so many of."""

from __future__ import annotations

from math import gcd

from shardstage.cost.kernels import num_experts
from shardstage.errors import PlanError
from shardstage.graph import ModelGraph

__all__ = ["require_dealt"]


def require_dealt(ep: int, graph: ModelGraph) -> None:
    """Raises ``PlanError`` where ``ep`` ranks cannot have equally many of the model's experts."""
    if ep == 1:
        return
    number = num_experts(graph)
    if not number:
        raise PlanError(
            f"ep={ep} deals experts out to ranks, and this model has no layer of experts whose tokens can be dealt out",
            hint=f"leave out ep={ep}",
        )
    if number % ep:
        dealt = gcd(number, ep)
        raise PlanError(
            f"ep={ep} ranks cannot have equally many of {number} experts",
            hint=f"ep={dealt}" if dealt > 1 else f"leave out ep={ep}",
        )
