"""``verify_mixed``: a second routine that checks the proof of a search over several device classes without its bounds.

It hashes what was searched, counts the space choice by choice, prices the plan as any given plan is priced, holds each class's peak against
its limit, and prices choices exactly, evenly over the whole space (all of a small one): none that fits may be faster, nor fit with less
savers than the plan has.
"""

from __future__ import annotations

from collections.abc import Iterator

from shardstage.planner.mixed.lanes import class_peaks, predict_mixed
from shardstage.planner.mixed.search import MixedResult, MixedSearcher
from shardstage.planner.mixed.space import MixedChoice
from shardstage.planner.space import Savers
from shardstage.planner.verify import ROUNDING, Verification, false_claims
from shardstage.planner.verify_needs import Thrifty, false_needs, fitting_without

__all__ = ["verify_mixed"]


def verify_mixed(searcher: MixedSearcher, found: MixedResult, *, max_checked: int = 500) -> Verification:
    """Checks the certificate of ``found`` against the space that ``searcher`` declares, pricing about ``max_checked`` choices, and twice as
    many with less savers, where the plan has any that were not asked for."""
    rungs = searcher.rungs
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
    problems += false_needs(
        found.certificate, best=found.best, savers=found.savers, rungs=rungs, num_choices=num_choices
    )
    peaks = class_peaks(searcher.graph, found.best, used, units=units)
    for share, peak in zip(found.shares, peaks, strict=True):
        if peak > share.limit_bytes:
            problems.append(f"{share.name} holds {peak} bytes of {share.limit_bytes}")
    step, cost_s, thrifty = max(1, num_choices // max_checked), found.certificate.cost_s, Thrifty()
    checked: list[MixedChoice] = []
    for number, choice in enumerate(_choices(searcher)):
        of = choice.arrangement
        thrifty.add(choice, of.mesh, zero=choice.zero.level, microbatch=max(of.sizes))
        if number % step:
            continue
        checked.append(choice)
        priced = searcher.pricing.price(choice, limits)
        if priced is not None and priced.seconds < cost_s * (1 - ROUNDING):
            problems.append(f"{choice} takes {priced.seconds} s, less than {cost_s} s")
    tried = (found.priced.choice, *thrifty.choices(max_checked), *checked)

    def fits(savers: Savers, choice: MixedChoice) -> bool:
        searcher.use(savers)
        return searcher.pricing.price(choice, limits) is not None

    if found.savers in rungs:
        problems += fitting_without(rungs[: rungs.index(found.savers)], tried, fits)
    searcher.use(found.savers)
    return Verification(problems=tuple(problems), num_choices=num_choices, num_checked=len(checked))


def _choices(searcher: MixedSearcher) -> Iterator[MixedChoice]:
    """Every choice of the space, by plain loops."""
    space = searcher.space
    for sharding in space.shardings:
        for arrangement in searcher.arrangements(sharding):
            for zero in space.zeros_of(arrangement):
                for schedule in space.schedules_of(arrangement):
                    yield MixedChoice(arrangement, zero, schedule)
