"""Savers of last resort: searched only where nothing fits without, said where they were needed, and kept where they were asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.cost.machines import round_machine
from tests.cost.toy import toy_graph
from tests.planner.brute import every_choice

from shardstage.cluster import HostShare
from shardstage.errors import PlanError
from shardstage.graph import ModelGraph
from shardstage.plan import Precision, Request, check, named_decisions, parse_request, shorthand
from shardstage.planner import Searcher, SearchResult, predict, verify_certificate
from shardstage.planner.space import Savers, ladder

HOST = HostShare(link_bytes_per_s=1e8, memory_bytes_per_s=1e8, memory_bytes=2**40, source="made up")
PLENTY = 2**40


def as_bfloat16(graph: ModelGraph) -> ModelGraph:
    values = {
        name: replace(value, dtype="bfloat16") if value.dtype == "float32" else value
        for name, value in graph.values.items()
    }
    return replace(graph, values=values)


GRAPH = toy_graph(num_layers=4, width=128, hidden=512, vocab=512)
NARROW = as_bfloat16(GRAPH)


def searcher_of(
    fix: str = "", *, precision: Precision = "bfloat16", host_bytes: int = HOST.memory_bytes
) -> Searcher:
    cluster = round_machine(4)
    device = replace(cluster.device, host=replace(HOST, memory_bytes=host_bytes))
    return Searcher(
        NARROW if precision == "bfloat16" else GRAPH,
        replace(cluster, device=device),
        num_ranks=2,
        global_batch=4,
        sequence=16,
        precision=precision,
        fix=parse_request(fix),
        fixed=named_decisions(fix),
    )


def test_the_ladder_has_a_rung_for_each_saver_and_one_for_both() -> None:
    nothing, all_open = Request(), frozenset[str]()
    rungs = [str(savers) for savers in ladder("bfloat16", nothing, all_open)]
    assert rungs == ["", "grads=bfloat16", "offload=optimizer", "grads=bfloat16,offload=optimizer"]
    assert [str(savers) for savers in ladder("float32", nothing, all_open)] == ["", "offload=optimizer"]


def test_what_was_asked_for_is_the_only_rung_of_its_kind() -> None:
    asked = parse_request("grads=bf16,offload=optimizer")
    both = frozenset({"gradient_dtype", "offload"})
    assert ladder("bfloat16", asked, both) == (Savers("bfloat16", "optimizer"),)
    assert [s.offload for s in ladder("float32", Request(), frozenset({"offload"}))] == ["none"]


def test_a_cpu_has_nowhere_to_offload_to() -> None:
    assert ladder("float32", Request(), frozenset(), has_host=False) == (Savers(),)
    alone = Searcher(GRAPH, round_machine(4, kind="cpu"), num_ranks=2, global_batch=4, sequence=16)
    limit = alone.best(PLENTY).prediction.peak_bytes
    with pytest.raises(PlanError, match="no plan for"):
        alone.best(limit // 20)


def test_where_something_fits_nothing_is_saved() -> None:
    found = searcher_of().best(PLENTY)
    assert (found.best.gradient_dtype, found.best.offload) == (None, "none")
    assert found.certificate.needs == found.certificate.necessity() == ""


def test_less_and_less_memory_climbs_the_ladder_and_says_what_was_needed() -> None:
    searcher = searcher_of()
    limit = searcher.best(PLENTY).prediction.peak_bytes
    used: list[str] = []
    with pytest.raises(PlanError, match="no plan for 2 ranks fits"):
        while True:
            found = searcher.best(limit)
            needs = str(Savers(found.best.gradient_dtype, found.best.offload))
            assert found.certificate.needs == needs
            assert found.prediction.peak_bytes <= limit
            assert predict(NARROW, found.best, searcher.cluster) == found.prediction
            check(found.best, NARROW, num_ranks=2, cluster=searcher.cluster)
            used.append(needs)
            limit = int(0.93 * limit)
    rungs = [str(savers) for savers in ladder("bfloat16", Request(), frozenset())]
    places = [rungs.index(needs) for needs in used]
    assert places == sorted(places)
    assert {"", "offload=optimizer", "grads=bfloat16,offload=optimizer"} <= set(used)


def test_a_plan_with_savers_proves_that_nothing_fits_without_and_holds_before_the_second_routine() -> None:
    searcher = searcher_of()
    limit = searcher.best(PLENTY).prediction.peak_bytes
    while not (found := searcher.best(limit)).certificate.needs:
        limit = int(0.93 * limit)
    proof = found.certificate
    assert proof.without and proof.without % proof.enumerated == 0
    assert proof.necessity() == f"nothing fits without {proof.needs}: {proof.without:,} plans were tried"
    with pytest.raises(PlanError, match="no plan for"):
        searcher_of("offload=none,grads=fp32").best(limit)
    searcher.best(PLENTY)
    assert verify_certificate(searcher, found).problems == ()
    assert proof.needs in shorthand(found.best)


@pytest.fixture(scope="module")
def saved() -> tuple[Searcher, SearchResult]:
    """A plan that needs narrow gradients or an offloaded optimizer."""
    searcher = searcher_of()
    limit = searcher.best(PLENTY).prediction.peak_bytes
    while not (found := searcher.best(limit)).certificate.needs:
        limit = int(0.93 * limit)
    return searcher, found


@pytest.mark.parametrize(
    ("forged", "problem"),
    [
        ({"needs": ""}, "beyond what was asked for, and the certificate says it needs nothing"),
        ({"needs": "offload=none"}, "and the certificate says it needs offload=none"),
        ({"without": 0}, "and the certificate says 0 were tried"),
        ({"without": 7}, "choices with less savers, and the certificate says 7 were tried"),
    ],
)
def test_forged_needs_are_caught(
    saved: tuple[Searcher, SearchResult], forged: dict[str, Any], problem: str
) -> None:
    searcher, found = saved
    lie = replace(found, certificate=replace(found.certificate, **forged))
    (told,) = verify_certificate(searcher, lie, max_checked=1).problems
    assert problem in told


def test_savers_that_nothing_asks_for_are_caught() -> None:
    """A search that went straight to the last rung, and says that nothing fits on the others."""
    plain, hasty = searcher_of(), searcher_of("grads=bf16,offload=optimizer")
    asked = hasty.best(PLENTY)
    proof = asked.certificate
    plain.use(asked.savers)
    told = {"needs": str(asked.savers), "without": 3 * proof.enumerated, "space": plain.space.fingerprint}
    lie = replace(asked, certificate=replace(proof, **told))
    problems = verify_certificate(plain, lie, max_checked=1).problems
    assert [problem.rpartition(" fits with ")[2] for problem in problems] == [
        "no savers",
        "grads=bfloat16",
        "offload=optimizer",
    ]


def test_one_choice_that_fits_without_is_found_among_all_that_do_not() -> None:
    """Its ranks share all there is to share: even steps over the space pass by it."""
    searcher = searcher_of()
    priced = [searcher.pricing.price(choice, PLENTY) for choice in every_choice(searcher)]
    least = min(each.prediction.peak_bytes for each in priced if each is not None)
    honest = searcher.best(least)
    assert not honest.certificate.needs
    both = searcher_of("grads=bf16,offload=optimizer")
    asked = both.best(least)
    searcher.use(asked.savers)
    told = {
        "needs": str(asked.savers),
        "without": 3 * asked.certificate.enumerated,
        "space": searcher.space.fingerprint,
    }
    lie = replace(asked, certificate=replace(asked.certificate, **told))
    problems = verify_certificate(searcher, lie, max_checked=3).problems
    assert any(problem.endswith("fits with no savers") for problem in problems)


def test_a_plan_with_other_savers_than_the_search_had_is_caught(
    saved: tuple[Searcher, SearchResult],
) -> None:
    searcher, found = saved
    narrow = searcher_of("grads=fp32")
    problems = verify_certificate(narrow, replace(found, savers=Savers("bfloat16")), max_checked=1).problems
    assert any("search was for grads=float32, grads=float32,offload=optimizer" in each for each in problems)
    other = replace(found, savers=Savers())
    problems = verify_certificate(searcher, other, max_checked=1).problems
    assert any("and the result says no savers" in problem for problem in problems)


def test_what_was_asked_for_is_kept_where_more_would_fit_without() -> None:
    found = searcher_of("grads=bf16,offload=optimizer").best(PLENTY)
    assert (found.best.gradient_dtype, found.best.offload) == ("bfloat16", "optimizer")
    assert found.certificate.needs == ""
    assert found.prediction.host_bytes > 0


def test_an_optimizer_is_not_offloaded_to_a_host_that_is_too_small() -> None:
    tight = searcher_of("offload=optimizer", host_bytes=1000)
    with pytest.raises(PlanError, match="no plan for"):
        tight.best(PLENTY)
    assert searcher_of(host_bytes=1000).best(PLENTY).best.offload == "none"


@pytest.mark.parametrize("fix", ["", "grads=bf16", "offload=optimizer", "grads=bf16,offload=optimizer"])
def test_no_bound_is_above_a_price(fix: str) -> None:
    """Bounds of time and memory, group by group, against every choice priced exactly."""
    searcher = searcher_of(fix)
    best_s = searcher.best(PLENTY).prediction.step_time_s
    priced = [searcher.pricing.price(choice, PLENTY) for choice in every_choice(searcher)]
    assert min(p.seconds for p in priced if p is not None) == best_s
    tight = min(p.prediction.peak_bytes for p in priced if p is not None)
    assert searcher.best(tight).prediction.peak_bytes <= tight
