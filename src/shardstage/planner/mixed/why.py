"""``mixed_alternatives``: what one other decision would cost over several classes of devices, and why it was not taken.

An alternative is the best plan with one decision changed (``changes``), its stages cut anew by the search's own prices. What does not fit
names the rank that lacks memory most, where all classes had as much more as it takes. A class that computes nothing leaves the best
plan of a search over the other one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

from shardstage.errors import PlanError
from shardstage.planner.mixed.changes import LIES, Change, changes
from shardstage.planner.mixed.priced import MixedPriced
from shardstage.planner.mixed.pricing import MixedPricing
from shardstage.planner.mixed.search import MixedResult, MixedSearcher
from shardstage.planner.mixed.space import MixedChoice
from shardstage.planner.told import (
    SHOWN_RATIO,
    Alternative,
    cause_text,
    excess_text,
    grown_most,
    in_order,
    leaving_text,
    schedule_text,
    slower_text,
)
from shardstage.units import format_ratio

__all__ = ["mixed_alternatives"]

MOST_DOUBLINGS: Final = 10
"""A choice that does not fit into a thousand times the memory has another reason."""

LIMIT_PRECISION: Final = 1 / 128
"""Memory that a choice lacks is found to such a part of the limit."""


def mixed_alternatives(searcher: MixedSearcher, found: MixedResult) -> tuple[Alternative, ...]:
    """Every single change of the best plan's decisions, cheapest first; with two classes, each of them idle, too."""
    searcher.use(found.savers)
    limits = found.limits
    told = [_told(searcher, found.priced, change, limits) for change in changes(searcher, found.priced)]
    return in_order([*told, *_idle(searcher, found)])


def _told(searcher: MixedSearcher, best: MixedPriced, change: Change, limits: Sequence[int]) -> Alternative:
    pricing = searcher.pricing
    if change.recompute is not None:
        pricing = pricing.asking(change.recompute)
    priced = [pricing.price(choice, limits, firsts=change.firsts) for choice in change.variants]
    fitting = [each for each in priced if each is not None]
    if not fitting:
        reason = _excess(pricing, change, limits)
        return Alternative(change=change.text, reason=reason, prediction=None)
    fastest = min(fitting, key=lambda each: each.seconds)
    also = _also(best.choice, fastest.choice) if len(change.variants) > 1 else ""
    reason = slower_text(best.prediction, fastest.prediction, _cause(pricing, best, fastest, change))
    return Alternative(change=change.text + also, reason=reason, prediction=fastest.prediction)


def _cause(pricing: MixedPricing, best: MixedPriced, other: MixedPriced, change: Change) -> str:
    """Why it is slower: as one change asks for, more is computed again; one class has more to do than the others; else what grew most."""
    half_s = (other.seconds - best.seconds) / 2
    again_s = _again_s(pricing, other) - _again_s(pricing, best)
    if change.recompute is not None and again_s > half_s:
        return "more is computed again"
    (before_s, _), (waited_s, slowest) = _waited(pricing, best), _waited(pricing, other)
    is_busy = grown_most(best.prediction, other.prediction) in ("products", "memory")
    if is_busy and again_s <= half_s < waited_s - before_s:
        return f"{pricing.cluster.part(slowest).name} holds the others up"
    by_tp = leaving_text(pricing.cluster, other.choice.arrangement.sharding.tp)
    return cause_text(best.prediction, other.prediction, again_s=again_s, by_tp=by_tp)


def _waited(pricing: MixedPricing, priced: MixedPriced) -> tuple[float, int]:
    """Seconds of a step that the mean pipeline rank, or the mean pipeline, waits for the slowest one, and the class of that one."""
    of, setup = priced.choice.arrangement, priced.setup
    if of.by == "stages":
        stages, classes = priced.prediction.stages, of.lanes[0].classes
        ranks = (setup.stages_of(rank) for rank in range(of.pp))
        each = [sum(stages[stage].forward_s + stages[stage].backward_s for stage in own) for own in ranks]
        waited_s = priced.seconds * (1 - sum(each) / len(each) / max(each))
        return waited_s, classes[each.index(max(each))]
    each = [pricing.step_s(priced.choice, [lane], setup) for lane in of.lanes]
    mean_s = sum(number * seconds for number, seconds in zip(of.ways, each, strict=True)) / sum(of.ways)
    return max(each) - mean_s, each.index(max(each))


def _also(before: MixedChoice, after: MixedChoice) -> str:
    """What came with a change of axes, where the best plan could not decide it."""
    was, now, also = before.arrangement, after.arrangement, ""
    if was.sharding.tp == 1 and now.sharding.is_sequence_parallel:
        also += ", sp"
    if was.pp == 1 < now.pp:
        also += f", {LIES[now.by]}"
        if after.schedule != before.schedule:
            also += f", {schedule_text(after.schedule)}"
    if was.by != now.by and max(now.sizes) != max(was.sizes):
        also += f", mb={max(now.sizes)}"
    return also


def _again_s(pricing: MixedPricing, priced: MixedPriced) -> float:
    """Seconds of a step that recomputation takes."""
    if priced.setup.recompute == "none" and not priced.setup.recompute_of_stages:
        return 0.0
    keeping = replace(priced.setup, recompute="none", recompute_of_stages=())
    return priced.seconds - pricing.step_s(priced.choice, priced.choice.arrangement.lanes, keeping)


def _excess(pricing: MixedPricing, change: Change, limits: Sequence[int]) -> str:
    """What the rank that lacks most holds where the least has to be added to all limits."""
    least: tuple[float, MixedPriced] | None = None
    for choice in change.variants:
        found = _least_more(pricing, choice, change.firsts, limits)
        if found is not None and (least is None or found[0] < least[0]):
            least = found
    if least is None:
        return "does not fit: nor does the optimizer into the host's memory"
    _, priced = least
    number = max(range(len(limits)), key=lambda number: priced.peaks[number] / limits[number])
    who, peak = pricing.cluster.part(number).name, priced.peaks[number]
    holding = [pp for pp, use in enumerate(priced.prediction.ranks) if use.total_bytes == peak]
    if holding and len(priced.prediction.ranks) > 1:
        who = f"pipeline rank {holding[0]}, {who},"
    return excess_text(who, peak, limits[number])


def _least_more(
    pricing: MixedPricing, choice: MixedChoice, firsts: tuple[int, ...], limits: Sequence[int]
) -> tuple[float, MixedPriced] | None:
    """The least multiple of the limits into which a choice fits, with its price there."""

    def within(ratio: float) -> MixedPriced | None:
        return pricing.price(choice, [int(ratio * limit) for limit in limits], firsts=firsts)

    low, high, best = 1.0, 2.0, within(2.0)
    for _ in range(MOST_DOUBLINGS):
        if best is not None:
            break
        low, high = high, 2 * high
        best = within(high)
    if best is None:
        return None
    while high - low > LIMIT_PRECISION * high:
        middle = (low + high) / 2
        found = within(middle)
        if found is None:
            low = middle
        else:
            best, high = found, found.fill_ratio(limits)
    return high, best


def _idle(searcher: MixedSearcher, found: MixedResult) -> Iterator[Alternative]:
    """Each of two classes left out: the best plan of the other one."""
    parts = searcher.cluster.parts
    for number in range(2) if len(parts) == 2 else ():
        change, other = f"{parts[number].name} idle", 1 - number
        limit_bytes = found.limits[other]
        try:
            best = searcher.on(other).best(limit_bytes)
        except PlanError as error:
            if "fits into" in error.message:
                yield Alternative(change=change, reason=f"does not fit: {error.message}", prediction=None)
            continue
        gain = 1 - best.prediction.step_time_s / found.prediction.step_time_s
        reason = slower_text(found.prediction, best.prediction, "without them")
        if gain >= SHOWN_RATIO:
            rest = f"{parts[other].name}:{parts[other].num_devices}"
            reason = f"{format_ratio(gain)} faster: --cluster {rest}"
        yield Alternative(change=change, reason=reason, prediction=best.prediction)
