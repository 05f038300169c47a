"""``verify_mixed``: a second routine that checks the proof of a search over several device classes without its bounds.

It hashes what was searched, counts the space choice by choice, prices the plan as any given plan is priced, holds each class's peak against
its limit, and prices choices exactly, evenly over the whole space (all of a small one): none that fits may be faster.
"""

from __future__ import annotations

from collections.abc import Iterator

from shardstage.planner.mixed.lanes import class_peaks, predict_mixed
from shardstage.planner.mixed.search import MixedResult, MixedSearcher
from shardstage.planner.mixed.space import MixedChoice
from shardstage.planner.verify import ROUNDING, Verification, false_claims

__all__ = ["verify_mixed"]


def verify_mixed(searcher: MixedSearcher, found: MixedResult, *, max_checked: int = 500) -> Verification:
    """Checks the certificate of ``found`` against the space that ``searcher`` declares, pricing at most ``max_checked`` choices."""
    searcher.use(found.savers)
    limits, used = [share.limit_bytes for share in found.shares], found.cluster
    units = searcher.pricing.folded.starts
    num_choices = sum(1 for _ in _choices(searcher))
    problems = false_claims(
        found.certificate,
        graph=searcher.graph,
        cluster=searcher.cluster,
        space=searcher.space.fingerprint,
        num_choices=num_choices,
        price=predict_mixed(searcher.graph, found.best, used, units=units),
        said=found.prediction,
        limit_bytes=min(limits),
    )
    peaks = class_peaks(searcher.graph, found.best, used, units=units)
    for share, peak in zip(found.shares, peaks, strict=True):
        if peak > share.limit_bytes:
            problems.append(f"{share.name} holds {peak} bytes of {share.limit_bytes}")
    step, num_checked, cost_s = max(1, num_choices // max_checked), 0, found.certificate.cost_s
    for number, choice in enumerate(_choices(searcher)):
        if number % step:
            continue
        num_checked += 1
        priced = searcher.pricing.price(choice, limits)
        if priced is not None and priced.seconds < cost_s * (1 - ROUNDING):
            problems.append(f"{choice} takes {priced.seconds} s, less than {cost_s} s")
    return Verification(problems=tuple(problems), num_choices=num_choices, num_checked=num_checked)


def _choices(searcher: MixedSearcher) -> Iterator[MixedChoice]:
    """Every choice of the space, by plain loops."""
    space = searcher.space
    for sharding in space.shardings:
        for arrangement in searcher.arrangements(sharding):
            for zero in space.zeros_of(arrangement):
                for schedule in space.schedules_of(arrangement):
                    yield MixedChoice(arrangement, zero, schedule)
