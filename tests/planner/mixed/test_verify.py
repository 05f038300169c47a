"""The proof of a mixed search is checked by a second routine, which catches forged ones."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import pytest
from tests.cost.toy import Experts, toy_graph
from tests.planner.mixed.instances import (
    GRAPH,
    PLENTY,
    every_choice,
    machines,
    random_sharing_searcher,
    searcher_of,
)

from shardstage.cluster import Cluster, HostShare
from shardstage.plan import parse_request
from shardstage.planner import MixedResult, verify_mixed
from shardstage.planner.mixed.search import MixedSearcher

CLUSTER = machines((2, 1.0), (3, 2.0))
HOST = HostShare(link_bytes_per_s=1e8, memory_bytes_per_s=1e8, memory_bytes=2**40, source="made up")


@pytest.fixture(scope="module")
def searched() -> tuple[MixedSearcher, MixedResult]:
    searcher = searcher_of(CLUSTER, batch=6)
    return searcher, searcher.best((PLENTY, PLENTY))


def test_an_honest_proof_holds_over_the_whole_space(searched: tuple[MixedSearcher, MixedResult]) -> None:
    searcher, found = searched
    checked = verify_mixed(searcher, found, max_checked=10_000)
    assert checked.is_valid, checked.problems
    assert checked.num_checked == checked.num_choices == found.certificate.enumerated


def test_a_proof_holds_where_the_model_has_fewer_blocks_than_there_are_ranks() -> None:
    """Its units are parts of blocks, which a given plan's are not."""
    graph = toy_graph(num_layers=2, width=64, experts=Experts(number=2, hidden=64, chosen=1))
    fix, fixed = (
        parse_request("tp=1,zero=3,schedule=1f1b,recompute=none"),
        {"tp", "zero", "schedule", "recompute"},
    )
    searcher = searcher_of(
        machines((8, 1.0), (8, 2.0)), graph=graph, batch=32, fix=fix, fixed=frozenset(fixed)
    )
    found = searcher.best((PLENTY, PLENTY))
    assert len(searcher.pricing.folded.units) > 2 + 2, "a layer can be cut before its experts"
    checked = verify_mixed(searcher, found, max_checked=20)
    assert checked.is_valid, checked.problems


def test_a_proof_holds_where_sequences_and_experts_may_be_shared() -> None:
    searcher = random_sharing_searcher(Random(500))
    found = searcher.best((PLENTY, PLENTY))
    checked = verify_mixed(searcher, found, max_checked=200)
    assert checked.is_valid, checked.problems
    assert {sharding.is_plain for sharding in searcher.space.shardings} == {False, True}


@pytest.mark.parametrize(
    ("forged", "problem"),
    [
        ({"priced": 0}, "the certificate deals with"),
        ({"cost_s": 1e-9, "best_bound_s": 1e-9}, "the certificate says 1e-09 s"),
        ({"best_bound_s": 1e-9}, "was left out"),
        ({"best_bound_s": 1e9}, "nothing is said to take less"),
        ({"limit_bytes": 1}, "a rank may hold"),
        ({"graph": "x"}, "the graph is another one"),
        ({"cluster": "x"}, "the cluster is another one"),
        ({"space": "x"}, "the space is another one"),
    ],
)
def test_a_forged_certificate_is_caught(
    searched: tuple[MixedSearcher, MixedResult], forged: dict[str, Any], problem: str
) -> None:
    searcher, found = searched
    proof = replace(found.certificate, **forged)
    checked = verify_mixed(searcher, replace(found, certificate=proof), max_checked=1)
    assert any(problem in each for each in checked.problems)


def test_a_slower_plan_that_is_called_the_best_is_caught(searched: tuple[MixedSearcher, MixedResult]) -> None:
    searcher, found = searched
    worst = max(
        (searcher.pricing.price(choice, (PLENTY, PLENTY)) for choice in every_choice(searcher)[::40]),
        key=lambda priced: priced.seconds if priced else 0.0,
    )
    assert worst is not None and worst.seconds > found.prediction.step_time_s
    proof = replace(found.certificate, cost_s=worst.seconds, best_bound_s=worst.seconds)
    used = CLUSTER.with_parts(worst.choice.arrangement.used)
    lie = replace(found, best=worst.plan, prediction=worst.prediction, cluster=used, certificate=proof)
    problems = verify_mixed(searcher, lie, max_checked=10_000).problems
    assert problems and all("less than" in each for each in problems)


def test_a_plan_that_does_not_fit_is_caught(searched: tuple[MixedSearcher, MixedResult]) -> None:
    searcher, found = searched
    shares = tuple(replace(share, limit_bytes=share.peak_bytes - 1) for share in found.shares)
    problems = verify_mixed(searcher, replace(found, shares=shares), max_checked=1).problems
    assert any("class0 holds" in each for each in problems)


@pytest.fixture(scope="module")
def saved() -> tuple[MixedSearcher, MixedResult]:
    """A plan that needs its optimizer in the host's memory."""
    cluster = machines((1, 1.0), (1, 1.0))
    parts = [replace(part, device=replace(part.device, host=HOST)) for part in cluster.joined]
    cluster = Cluster.of_parts(tuple(parts), name="mixed", network=cluster.levels[-1])
    searcher = MixedSearcher(GRAPH, cluster, global_batch=6, sequence=64, precision="float32")
    limit = max(share.peak_bytes for share in searcher.best((PLENTY, PLENTY)).shares)
    while not (found := searcher.best((limit, limit))).certificate.needs:
        limit = int(0.9 * limit)
    return searcher, found


def test_an_honest_need_of_savers_holds(saved: tuple[MixedSearcher, MixedResult]) -> None:
    checked = verify_mixed(*saved, max_checked=10_000)
    assert checked.is_valid, checked.problems
    assert saved[1].certificate.without == checked.num_choices


@pytest.mark.parametrize(
    ("forged", "problem"),
    [
        ({"needs": ""}, "the certificate says it needs nothing"),
        ({"without": 1}, "the certificate says 1 were tried"),
    ],
)
def test_a_forged_need_of_savers_is_caught(
    saved: tuple[MixedSearcher, MixedResult], forged: dict[str, Any], problem: str
) -> None:
    searcher, found = saved
    lie = replace(found, certificate=replace(found.certificate, **forged))
    (told,) = verify_mixed(searcher, lie, max_checked=1).problems
    assert problem in told


def test_savers_without_need_are_caught(saved: tuple[MixedSearcher, MixedResult]) -> None:
    """All that the plan has is right, but the limit: with more memory it fits without."""
    searcher, found = saved
    shares = tuple(replace(share, limit_bytes=PLENTY) for share in found.shares)
    proof = replace(found.certificate, limit_bytes=PLENTY)
    problems = verify_mixed(
        searcher, replace(found, shares=shares, certificate=proof), max_checked=1
    ).problems
    assert any(problem.endswith("fits with no savers") for problem in problems)
