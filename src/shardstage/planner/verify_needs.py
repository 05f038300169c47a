"""What a certificate says of savers, checked without the bounds that the search left choices out by.

The plan's savers must be on the ladder that was searched (``space.ladder``), ``needs`` what they are beyond its first rung, and ``without``
all choices of the rungs before. That none of those fits is tried by pricing: choices evenly over the space, the plan's own, and of each way
to share the model the choice that holds least by its looks.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

from shardstage.layout import Mesh
from shardstage.plan import Plan
from shardstage.planner.certificate import Certificate
from shardstage.planner.space import Savers

__all__ = ["Thrifty", "false_needs", "fitting_without"]

C = TypeVar("C", bound=Hashable)


class Thrifty:
    """Of each way to share the model (tp, pp, cp, dp) the choice of the highest ZeRO level and the smallest microbatch."""

    def __init__(self) -> None:
        self._least: dict[tuple[int, ...], tuple[tuple[int, int], Any]] = {}

    def add(self, choice: Hashable, mesh: Mesh, *, zero: int, microbatch: int) -> None:
        key, held = (mesh.tp, mesh.pp, mesh.cp, mesh.dp), (-zero, microbatch)
        if key not in self._least or held < self._least[key][0]:
            self._least[key] = held, choice

    def choices(self, most: int) -> list[Any]:
        """At most so many, evenly."""
        found = [choice for _, choice in self._least.values()]
        return found[:: max(1, -(-len(found) // most))]


def false_needs(
    proof: Certificate, *, best: Plan, savers: Savers, rungs: Sequence[Savers], num_choices: int
) -> list[str]:
    """What is said otherwise than it is of the savers of a plan that was found on one of the ``rungs``."""
    used = Savers(best.gradient_dtype, best.offload)
    if used != savers:
        return [f"the plan has {_text(used)}, and the result says {_text(savers)}"]
    if used not in rungs:
        return [f"the plan has {_text(used)}, and the search was for {', '.join(map(_text, rungs))}"]
    problems, needs = [], used.beyond(rungs[0])
    if proof.needs != str(needs):
        said = proof.needs or "nothing"
        problems.append(
            f"the plan has {_text(needs)} beyond what was asked for, and the certificate says it needs {said}"
        )
    num_without = rungs.index(used) * num_choices
    if proof.without != num_without:
        problems.append(
            f"there are {num_without} choices with less savers, and the certificate says {proof.without} were tried"
        )
    return problems


def fitting_without(
    rungs: Iterable[Savers], choices: Iterable[C], fits: Callable[[Savers, C], bool]
) -> list[str]:
    """Of each rung before the one that a plan was found on the first choice that fits, of which there should be none."""
    tried = list(dict.fromkeys(choices))
    problems = []
    for savers in rungs:
        fitting = next((choice for choice in tried if fits(savers, choice)), None)
        if fitting is not None:
            problems.append(f"{fitting} fits with {_text(savers)}")
    return problems


def _text(savers: Savers) -> str:
    return str(savers) or "no savers"
