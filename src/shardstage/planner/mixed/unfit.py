"""``nothing_fits``: the refusal where no plan for several classes of devices fits, with a change after which one does.

A decision that is left out of those fixed, if one will do: the one whose best plan is fastest. Else more memory: of the plans that fit
into a multiple of the limits, and of those a few changes away, one that holds least.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from shardstage.errors import PlanError
from shardstage.plan import decision_named, shorthand
from shardstage.planner.mixed.front import best_near
from shardstage.planner.mixed.priced import MixedPriced
from shardstage.planner.mixed.search import MixedResult, MixedSearcher
from shardstage.units import format_bytes, format_s

__all__ = ["nothing_fits"]

KEPT: Final = frozenset({"precision", "is_compiled", "recompute_modules"})
"""What is asked of the model's run rather than of a plan for it."""

MOST_DOUBLINGS: Final = 8

LIMIT_PRECISION: Final = 1 / 32
"""Memory that would do is found to such a part of it."""

GIB: Final = 2**30


def nothing_fits(searcher: MixedSearcher, limits: Sequence[int]) -> PlanError:
    """What to say of a search that has found nothing within limits. Takes a search for each fixed decision, and for each doubling of
    memory."""
    error = searcher.refusal(limits)
    opened = _opened(searcher, limits)
    if opened is not None:
        name, found = opened
        text = shorthand(found.best, default_precision=found.best.precision)
        hint = f'leave {decision_named(name)} out of --fix: "{text}" fits, {format_s(found.prediction.step_time_s)} a step'
        return PlanError(error.message, hint=hint)
    least = _least(searcher, limits)
    if least is None:
        return error
    text, peaks = shorthand(least.plan, default_precision=least.plan.precision), least.peaks
    needed = f'"{text}" would hold {" and ".join(map(format_bytes, peaks))}'
    there = [part.device.memory_bytes for part in searcher.cluster.parts]
    most = _rounded_up(max(peaks))
    hint = f"--max-memory {most}"
    if any(peak > most_there for peak, most_there in zip(peaks, there, strict=True)):
        hint = "a --cluster of more or larger devices, or a smaller --batch or --seq"
    return PlanError(f"{error.message}; {needed}", hint=hint)


def _opened(searcher: MixedSearcher, limits: Sequence[int]) -> tuple[str, MixedResult] | None:
    """The fixed decision without which a plan fits, and that plan; of several the fastest."""
    opened = []
    for name in sorted(searcher.fixed - KEPT):
        try:
            found = searcher.without(name).find(limits)
        except PlanError:
            continue
        if found is not None:
            opened.append((name, found))
    return min(opened, key=lambda each: each[1].prediction.step_time_s, default=None)


def _least(searcher: MixedSearcher, limits: Sequence[int]) -> MixedPriced | None:
    """A plan that holds as small a multiple of the limits as single changes lead to."""
    for doubling in range(1, MOST_DOUBLINGS + 1):
        found = searcher.find([limit << doubling for limit in limits])
        if found is not None:
            break
    else:
        return None
    low, best = float(1 << doubling - 1), found.priced
    while best.fill_ratio(limits) - low > LIMIT_PRECISION * low:
        middle = (low + best.fill_ratio(limits)) / 2
        smaller = best_near(searcher, (best,), [int(middle * limit) for limit in limits])
        if smaller is None:
            low = middle
        else:
            best = smaller
    return best


def _rounded_up(num_bytes: int) -> str:
    """As one types it."""
    if num_bytes >= GIB:
        return f"{math.ceil(10 * num_bytes / GIB) / 10:g}GiB"
    return f"{math.ceil(num_bytes / 2**20)}MiB"
