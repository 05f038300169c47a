"""``Need``: what the first rank of a class holds and must recompute at least, from sums alone: known sooner than what all ranks hold.

Of several stages a rank, at a moment at which it holds h_c microbatches on its stage c, whose units keep b_c bytes, it sheds

    D = Σ h_c b_c + state - limit        and no second of recomputation spares more than max_c h_c × ρ        ρ bytes a second of any unit
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import mul

import numpy as np
import numpy.typing as npt

from shardstage.cost import StepSetup
from shardstage.cost.memory import MOMENTS
from shardstage.cost.profile import RECOMPUTES
from shardstage.planner.chain import Chain

__all__ = ["Need", "need_of", "spared_bytes_per_s", "state_bytes"]

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """Of one rank: ``seconds`` of its stages for a microbatch, ``elements`` of parameters; and for each moment the bytes that activations
    take without recomputation, those with as much as can be, and the bytes that a second of it spares at most."""

    number: int
    seconds: float
    elements: float
    moments: tuple[tuple[float, float, float], ...]

    def least_s(self, state_bytes: float, limit_bytes: float) -> float:
        """Seconds of the rank with what it recomputes at least, where an element has so many bytes of state; infinite where it cannot
        fit."""
        room, most_s = limit_bytes - self.elements * state_bytes, 0.0
        for plain, least, bytes_per_s in self.moments:
            if least > room:
                return math.inf
            if plain > room and bytes_per_s:
                most_s = max(most_s, (plain - room) / bytes_per_s)
        return self.seconds + most_s


def need_of(setup: StepSetup, rank: int, number: int, chain: Chain, bytes_per_s: float) -> Need:
    """Of a rank on the class of a ``number``, whose units spare so many bytes a second at most."""
    spans = list(pairwise((*setup.starts, chain.num_units)))
    own = [spans[stage] for stage in setup.stages_of(rank)]

    def sums(values: Sequence[float]) -> list[float]:
        return [values[stop] - values[start] for start, stop in own]

    plain = sums(chain.saved["none"])
    least = [min(each) for each in zip(*(sums(chain.saved[mode]) for mode in RECOMPUTES), strict=True)]
    return Need(
        number=number,
        seconds=sum(sums(chain.both_s)),
        elements=sum(sums(chain.own)),
        moments=tuple(
            (sum(map(mul, held, plain)), sum(map(mul, held, least)), max(held) * bytes_per_s)
            for held in setup.in_flight_together(rank)
        ),
    )


def spared_bytes_per_s(chain: Chain) -> float:
    """The most bytes that a second of recomputation spares in any unit."""
    most = 0.0
    for unit in chain.kinds:
        for mode in RECOMPUTES:
            kept = unit.kept[mode]
            spared = unit.kept["none"].saved_bytes - kept.saved_bytes
            if spared > 0:
                most = max(most, spared / kept.recompute_s if kept.recompute_s else math.inf)
    return most


def state_bytes(setup: StepSetup, level: Array, shards: Array) -> Array:
    """[row]: bytes of parameters, gradients and optimizer for each element of a stage, at least (``cost.memory``'s table)."""
    c, g, w = setup.compute_bytes, setup.gradient_bytes, setup.master_bytes
    is_cut = level >= 2
    stored = np.where(is_cut, g, c)
    has_own_masters = setup.is_offloaded | (stored != w)
    of_master = np.where(is_cut | has_own_masters, w, 0)
    of_owned = np.zeros_like(shards) if setup.is_offloaded else of_master + MOMENTS * w
    of_owned = of_owned + np.where(level >= 1, g, 0) + np.where(is_cut & has_own_masters, g, 0)
    whole = np.where(level >= 3, 0, np.where(level == 2, c, c + g))
    found: Array = whole + of_owned / shards
    return found
