"""``lacks_room``: of many choices with 1F1B at once, those of which no cut both fits and is quick enough.

A stage that may take τ seconds and M bytes holds n layers, whatever parts y_k of them it recomputes in the ways k, where

    n Σ_k y_k (c + r_k) <= τ        seconds of a layer, and of recomputing it
    n Σ_k y_k (s + h b_k) <= M      bytes of its state, and of what h microbatches in flight keep of it

so that for any weight 0 <= u <= 1

    n <= 1 / min_k [ u (c + r_k) / τ + (1 - u) (s + h b_k) / M ]

and layers are whole. The first stage holds as many microbatches as there are stages, the last one a single one: bounds of the mean stage
do not see that the first ones are too full. Under schedules whose stages all hold as many, they do.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from shardstage.planner.table import Table

__all__ = ["lacks_room"]

ROUNDING = 1e-6
"""Layers that a bound may miss by rounding."""


def lacks_room(table: Table, below_s: float) -> npt.NDArray[np.bool_]:
    """[row]: whether the layers do not fit where a step is to take less than ``below_s``."""
    terms, group, p = table.terms, table.group, table.p
    budget_s = table.most_stage_s(below_s)
    budget_bytes = table.most_layer_bytes()
    least_s, least_bytes = table.least_of_layer()
    with np.errstate(divide="ignore", invalid="ignore"):
        of_seconds = [(least_s + again[group]) / budget_s for again, _, _ in terms.most_modes]
        of_state = least_bytes / budget_bytes
        kept = [saved[group] / budget_bytes for _, saved, _ in terms.most_modes]
    stage = np.arange(p.max(initial=0.0))[None]
    held = np.maximum(1.0, np.minimum(table.m, p - stage))
    of_bytes = [of_state + held * each for each in kept]
    with np.errstate(divide="ignore", invalid="ignore"):
        number = np.floor(1 / _largest_least(of_seconds, of_bytes) + ROUNDING)
    total = np.where(stage < p, number, 0.0).sum(axis=1)
    found: npt.NDArray[np.bool_] = (
        (budget_s <= 0) | (budget_bytes <= 0) | (total[:, None] < terms.most_number[group])
    )[:, 0]
    return found


def _largest_least(first: list[Any], second: list[Any]) -> Any:
    """max over 0 <= u <= 1 of min_k [u first_k + (1 - u) second_k]: concave, so at an end or where two of the lines cross."""
    weights: list[Any] = [0.0, 1.0]
    for one, other in combinations(range(len(first)), 2):
        slopes = first[one] - second[one], first[other] - second[other]
        with np.errstate(divide="ignore", invalid="ignore"):
            crossing = (second[other] - second[one]) / (slopes[0] - slopes[1])
        weights.append(np.clip(np.nan_to_num(crossing), 0.0, 1.0))
    least = [
        np.minimum.reduce([u * f + (1 - u) * s for f, s in zip(first, second, strict=True)]) for u in weights
    ]
    return np.maximum.reduce(np.broadcast_arrays(*least))
