"""``more_savers``: what savers beyond those of the best plan would bring, though it fits without them.

They are searched only where nothing fits without (docs/decisions/0013), and yet may be faster: narrow gradients halve what is reduced, and
either leaves memory in which less is computed again. Here the plan's own choice is priced with them: cut into stages and recomputed
anew, on the same mesh. A search with them may find more (``--fix grads=bf16``), and takes as long as one without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardstage.cost import Prediction
from shardstage.planner.search import Searcher, SearchResult
from shardstage.planner.space import Savers

if TYPE_CHECKING:
    from shardstage.planner.mixed.priced import MixedPriced
    from shardstage.planner.mixed.search import MixedResult, MixedSearcher
    from shardstage.planner.pricing import Priced

__all__ = ["Saving", "mixed_more_savers", "more_savers"]


@dataclass(frozen=True, kw_only=True)
class Saving:
    """A step with savers that the best plan does without: all that it has beyond what was asked for.

    ``gain`` is the share of the best plan's step that they spare, below 0 where they take longer; ``plan`` the shorthand of the best plan
    with them, empty where the plan's own choice was priced.
    """

    savers: Savers
    prediction: Prediction
    gain: float
    plan: str = ""


def more_savers(searcher: Searcher, found: SearchResult) -> tuple[Saving, ...]:
    """The best plan's choice with each of the savers that were not searched, as far as it fits."""
    return _savings(searcher, found, lambda: searcher.pricing.price(found.priced.choice, found.limit_bytes))


def mixed_more_savers(searcher: MixedSearcher, found: MixedResult) -> tuple[Saving, ...]:
    """``more_savers`` of a plan for several classes of devices."""
    return _savings(searcher, found, lambda: searcher.pricing.price(found.priced.choice, found.limits))


def _savings(
    searcher: Searcher | MixedSearcher,
    found: SearchResult | MixedResult,
    price: Callable[[], Priced | MixedPriced | None],
) -> tuple[Saving, ...]:
    """``price`` is of the best plan's choice, with the savers that the searcher is told to use."""
    rungs, savings = searcher.rungs, []
    for savers in rungs[rungs.index(found.savers) + 1 :]:
        searcher.use(savers)
        priced = price()
        if priced is not None:
            gain = 1 - priced.prediction.step_time_s / found.prediction.step_time_s
            savings.append(Saving(savers=savers.beyond(rungs[0]), prediction=priced.prediction, gain=gain))
    searcher.use(found.savers)
    return tuple(savings)
