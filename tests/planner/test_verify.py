"""The second routine: it agrees with an honest certificate and names what is wrong with a forged one."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.cost.machines import round_machine
from tests.cost.toy import Experts, toy_graph

from shardstage.plan import parse_request
from shardstage.planner import Searcher, SearchResult, predict, verify_certificate

GRAPH = toy_graph(num_layers=5, width=64, hidden=256, vocab=128)


def searched(ranks: int, *, is_runnable: bool = True) -> tuple[Searcher, SearchResult]:
    searcher = Searcher(
        GRAPH,
        round_machine(8, latency_s=1e-6),
        num_ranks=ranks,
        global_batch=12,
        sequence=32,
        is_runnable=is_runnable,
    )
    return searcher, searcher.best(2**40)


@pytest.mark.parametrize(("ranks", "is_runnable"), [(1, True), (3, True), (4, True), (3, False), (8, False)])
def test_an_honest_certificate_holds(ranks: int, is_runnable: bool) -> None:
    searcher, found = searched(ranks, is_runnable=is_runnable)
    checked = verify_certificate(searcher, found, max_checked=200)
    assert checked.problems == ()
    assert checked.num_choices == found.certificate.enumerated
    assert 0 < checked.num_checked <= 2 * 200


def test_a_certificate_holds_where_the_model_has_fewer_blocks_than_there_are_ranks() -> None:
    """The search cuts such a model into parts of blocks. The plan was once priced in whole blocks, and honest certificates refused."""
    searcher = Searcher(
        toy_graph(
            num_layers=3, width=64, hidden=1024, vocab=128, experts=Experts(number=2, hidden=64, chosen=1)
        ),
        round_machine(16, latency_s=1e-4, op_latency_s=1e-4),
        num_ranks=16,
        global_batch=32,
        sequence=32,
        fix=parse_request("tp=1,zero=3"),
        fixed=frozenset({"tp", "zero"}),
    )
    assert searcher.num_units > 3 + 2, "a layer can be cut before its experts"
    found = searcher.best(2**40)
    whole_s = predict(searcher.graph, found.best, searcher.cluster).step_time_s
    assert whole_s != pytest.approx(found.certificate.cost_s, rel=1e-3), "whole blocks take another time"
    assert verify_certificate(searcher, found, max_checked=50).problems == ()


def test_a_prediction_beside_the_certificate_is_checked_too() -> None:
    searcher, found = searched(3)
    said = found.prediction
    faster = replace(found, prediction=replace(said, step_time_s=said.step_time_s / 2))
    (problem,) = verify_certificate(searcher, faster, max_checked=1).problems
    assert "the prediction says" in problem and " s, and" in problem
    peak = max(use.total_bytes for use in said.ranks)
    emptier = replace(
        found, prediction=replace(said, ranks=tuple(replace(use, activations=0) for use in said.ranks))
    )
    (problem,) = verify_certificate(searcher, emptier, max_checked=1).problems
    assert problem.startswith(f"the plan holds {peak} bytes, and the prediction says")


def test_a_plan_that_holds_more_than_the_limit_is_found_out() -> None:
    searcher, found = searched(3)
    peak = found.prediction.peak_bytes
    less = replace(found, limit_bytes=peak - 1, certificate=replace(found.certificate, limit_bytes=peak - 1))
    (problem,) = verify_certificate(searcher, less, max_checked=1).problems
    assert problem == f"the plan holds {peak} bytes of {peak - 1}"


def test_a_plan_that_is_not_the_best_is_found_out() -> None:
    """The forger counts right and bounds nothing below its cost, but a choice is faster."""
    searcher, found = searched(4)
    worse = max((*found.front, found.priced), key=lambda priced: priced.seconds)
    for other in found.runners_up:
        if other.prediction.step_time_s > found.prediction.step_time_s * 1.001:
            forged = replace(
                found,
                best=other.plan,
                prediction=other.prediction,
                certificate=replace(
                    found.certificate,
                    cost_s=other.prediction.step_time_s,
                    best_bound_s=other.prediction.step_time_s,
                ),
            )
            assert any(
                "less than" in p for p in verify_certificate(searcher, forged, max_checked=10**6).problems
            )
            return
    assert worse.seconds >= found.prediction.step_time_s


def test_wrong_hashes_counts_and_costs_are_named() -> None:
    searcher, found = searched(2)
    for change, told in (
        ({"graph": "0"}, "the graph is another one"),
        ({"cluster": "0"}, "the cluster is another one"),
        ({"space": "0"}, "the space is another one"),
        ({"priced": found.certificate.priced + 1}, "the space has"),
        ({"cost_s": 2 * found.certificate.cost_s, "best_bound_s": 1e9}, "the plan takes"),
        ({"best_bound_s": found.certificate.cost_s / 2}, "was left out"),
        ({"best_bound_s": 2 * found.certificate.cost_s}, "nothing is said to take less"),
        ({"limit_bytes": 2**41}, "a rank may hold"),
    ):
        forged = replace(found, certificate=replace(found.certificate, **change))
        assert any(
            told in problem for problem in verify_certificate(searcher, forged, max_checked=1).problems
        )


def test_what_each_stage_waits_for_first_is_no_bound_of_what_all_take() -> None:
    """With ZeRO-3 the sum of what single units would wait for was once taken for unavoidable, and a faster plan left out."""
    cluster = round_machine(8, latency_s=1e-3)
    searcher = Searcher(
        toy_graph(num_layers=7, width=128, hidden=512, vocab=64),
        cluster,
        num_ranks=8,
        global_batch=32,
        sequence=32,
        fix=parse_request("zero=3"),
        fixed=frozenset({"zero"}),
    )
    found = searcher.best(2**40)
    assert verify_certificate(searcher, found, max_checked=10**6).problems == ()
