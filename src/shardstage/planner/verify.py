"""``verify_certificate``: a second routine that checks a search's proof without its bounds.

It hashes what was searched, counts the space choice by choice in plain loops, prices the plan as any given plan is priced, in the units
that the search cut the model into, holds its peak against the limit, and prices choices exactly, evenly over the whole space (all of a
small one): none that fits may be faster. What a large space's search left out by bounds it so tests by samples; ``num_checked`` says how
many. What the certificate says of savers is checked in the same way (``verify_needs``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from shardstage.cluster import Cluster
from shardstage.cost import Prediction
from shardstage.graph import ModelGraph
from shardstage.planner.certificate import Certificate, cluster_hash
from shardstage.planner.predict import predict
from shardstage.planner.search import Searcher, SearchResult
from shardstage.planner.space import Choice, Savers, are_near
from shardstage.planner.verify_needs import Thrifty, false_needs, fitting_without

__all__ = ["ROUNDING", "Verification", "false_claims", "verify_certificate"]

ROUNDING: Final = 1e-9
"""Sums of the same seconds in another order differ by less."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What was found wrong, nothing where the certificate holds; ``num_checked`` choices were priced exactly."""

    problems: tuple[str, ...]
    num_choices: int
    num_checked: int

    @property
    def is_valid(self) -> bool:
        return not self.problems


def verify_certificate(searcher: Searcher, found: SearchResult, *, max_checked: int = 500) -> Verification:
    """Checks the certificate of ``found`` against the space that ``searcher`` declares, pricing about ``max_checked`` choices, and twice as
    many with less savers, where the plan has any that were not asked for."""
    proof, rungs = found.certificate, searcher.rungs
    searcher.use(found.savers)
    choices = list(_choices(searcher)) if proof.enumerated <= MAX_LISTED else None
    num_choices = len(choices) if choices is not None else sum(1 for _ in _choices(searcher))
    price = predict(searcher.graph, found.best, searcher.cluster, units=searcher.pricing.folded.starts)
    problems = false_claims(
        proof,
        graph=searcher.graph,
        cluster=searcher.cluster,
        space=searcher.space.fingerprint,
        num_choices=num_choices,
        price=price,
        said=found.prediction,
        limit_bytes=found.limit_bytes,
    )
    problems += false_needs(proof, best=found.best, savers=found.savers, rungs=rungs, num_choices=num_choices)
    if price.peak_bytes > found.limit_bytes:
        problems.append(f"the plan holds {price.peak_bytes} bytes of {found.limit_bytes}")
    step, thrifty = max(1, num_choices // max_checked), Thrifty()
    checked: list[Choice] = []
    for number, choice in enumerate(choices if choices is not None else _choices(searcher)):
        thrifty.add(choice, choice.mesh, zero=choice.zero.level, microbatch=choice.group.microbatch)
        if number % step:
            continue
        checked.append(choice)
        priced = searcher.pricing.price(choice, found.limit_bytes)
        if priced is not None and priced.seconds < proof.cost_s * (1 - ROUNDING):
            problems.append(f"{choice} takes {priced.seconds} s, less than {proof.cost_s} s")
    tried = (found.priced.choice, *thrifty.choices(max_checked), *checked)

    def fits(savers: Savers, choice: Choice) -> bool:
        searcher.use(savers)
        return searcher.pricing.price(choice, found.limit_bytes) is not None

    if found.savers in rungs:
        problems += fitting_without(rungs[: rungs.index(found.savers)], tried, fits)
    searcher.use(found.savers)
    return Verification(problems=tuple(problems), num_choices=num_choices, num_checked=len(checked))


def false_claims(
    proof: Certificate,
    *,
    graph: ModelGraph,
    cluster: Cluster,
    space: str,
    num_choices: int,
    price: Prediction,
    said: Prediction,
    limit_bytes: int,
) -> list[str]:
    """What a certificate says otherwise than it is: what was searched and within what, how many choices there are, the price, what was left
    out; and what the prediction beside it says."""
    problems = [
        f"the {what} is another one: {there}, not {said}"
        for what, said, there in (
            ("graph", proof.graph, graph.fingerprint),
            ("cluster", proof.cluster, cluster_hash(cluster)),
            ("space", proof.space, space),
        )
        if said != there
    ]
    if proof.limit_bytes != limit_bytes:
        problems.append(f"a rank may hold {limit_bytes} bytes, and the certificate says {proof.limit_bytes}")
    if num_choices != proof.enumerated:
        problems.append(
            f"the space has {num_choices} choices, and the certificate deals with {proof.enumerated}"
        )
    for seconds, where in ((proof.cost_s, "certificate"), (said.step_time_s, "prediction")):
        if abs(price.step_time_s - seconds) > ROUNDING * seconds:
            problems.append(f"the plan takes {price.step_time_s} s, and the {where} says {seconds} s")
    if price.peak_bytes != said.peak_bytes:
        problems.append(f"the plan holds {price.peak_bytes} bytes, and the prediction says {said.peak_bytes}")
    if proof.best_bound_s < proof.cost_s * (1 - ROUNDING):
        problems.append(f"a choice bounded by {proof.best_bound_s} s was left out, below {proof.cost_s} s")
    elif proof.best_bound_s > proof.cost_s * (1 + ROUNDING):
        problems.append(
            f"nothing is said to take less than {proof.best_bound_s} s, and the plan takes {proof.cost_s} s"
        )
    return problems


MAX_LISTED: Final = 200_000
"""A larger space is walked twice rather than kept."""


def _choices(searcher: Searcher) -> Iterator[Choice]:
    """Every choice of the space, by plain loops over its declaration."""
    space, num_units = searcher.space, searcher.num_units
    for group in space.groups():
        for mesh in space.meshes(group.tp, group.cp):
            share = -(-space.global_batch // mesh.dp)
            m = -(-share // group.microbatch)
            if -(-share // m) != group.microbatch or space.global_batch // mesh.dp < m:
                continue
            holders = mesh.dp * group.cp * (group.tp if group.has_whole_experts else 1)
            if holders % group.ep or mesh.pp > num_units:
                continue
            is_bound = group.ep > 1 or group.has_whole_experts
            for order in space.orders_of(mesh):
                if is_bound and not are_near(replace(mesh, order=order)):
                    continue
                for zero in space.zeros_of(mesh):
                    for schedule in space.schedules_of(mesh.pp):
                        if mesh.pp * schedule.per_rank <= num_units:
                            yield Choice(
                                mesh=replace(mesh, order=order), group=group, zero=zero, schedule=schedule
                            )
