"""Whole experts in a search: weighed where they can be, priced as their plans are, and preferred where experts are small."""

from __future__ import annotations

import pytest
from tests.cost.machines import round_machine
from tests.cost.toy import Experts, toy_graph
from tests.planner.brute import PLENTY, all_priced, every_choice, least_s

from shardstage.cluster import Cluster, load
from shardstage.errors import PlanError
from shardstage.graph import ModelGraph
from shardstage.plan import check, complete, named_decisions, parse_request, shorthand
from shardstage.planner import Searcher, alternatives, predict, verify_certificate

MACHINE = round_machine(8, latency_s=1e-6)
DENSE = toy_graph(num_layers=2, width=64, hidden=256, vocab=128)


def moe(
    number: int = 4, hidden: int = 32, *, width: int = 64, chosen: int = 2, num_layers: int = 2
) -> ModelGraph:
    experts = Experts(number=number, hidden=hidden, chosen=chosen)
    return toy_graph(num_layers=num_layers, width=width, hidden=4 * width, vocab=128, experts=experts)


def searcher_of(
    fix: str, graph: ModelGraph | None = None, *, ranks: int = 4, is_runnable: bool = False
) -> Searcher:
    return Searcher(
        graph or moe(),
        MACHINE,
        num_ranks=ranks,
        global_batch=4,
        sequence=16,
        fix=parse_request(fix),
        fixed=named_decisions(fix) | {"offload"},
        is_runnable=is_runnable,
    )


def test_both_are_weighed_where_tensor_parallel_ranks_may_hold_experts() -> None:
    groups = searcher_of("cp=1").lattice.groups
    forms = {(group.tp > 1, group.is_sequence_parallel, group.has_whole_experts) for group in groups}
    cut = {(False, False, False), (True, False, False), (True, True, False)}
    assert forms == cut | {(True, True, True)}
    assert max(group.ep for group in groups if group.has_whole_experts) == 4


@pytest.mark.parametrize(("graph", "is_runnable"), [(DENSE, False), (moe(), True)], ids=["dense", "runnable"])
def test_nothing_is_added_where_they_cannot_be(graph: ModelGraph, is_runnable: bool) -> None:
    searcher = searcher_of("", graph, is_runnable=is_runnable)
    assert not any(group.has_whole_experts for group in searcher.lattice.groups)


def test_without_sequence_parallelism_they_are_tried_where_that_is_fixed() -> None:
    groups = searcher_of("sp=0,tp=2").lattice.groups
    assert {group.has_whole_experts for group in groups} == {False, True}


@pytest.mark.parametrize(
    ("fix", "tps", "whole"),
    [("etp=1", {1, 2, 4}, {False, True}), ("etp=2", {2}, {False}), ("etp=4", {4}, {False})],
)
def test_what_is_fixed_of_experts_is_kept(fix: str, tps: set[int], whole: set[bool]) -> None:
    """Without tensor parallelism experts are whole anyway."""
    searcher = searcher_of(fix)
    groups = searcher.lattice.groups
    assert {group.tp for group in groups} == tps
    assert {group.has_whole_experts for group in groups} == whole
    assert all(group.has_whole_experts for group in groups if group.tp > 1 and fix == "etp=1")
    plan = searcher.best(PLENTY).best
    asked = int(fix.partition("=")[2])
    assert (plan.etp or plan.mesh.tp) == asked


@pytest.mark.parametrize(
    ("fix", "graph", "message"),
    [
        ("etp=3", moe(), r"etp=3 cannot be: .* tp may be 1, 2, 4"),
        ("tp=2,etp=4", moe(), r"etp=4 cannot be: .* tp may be 2"),
        ("etp=1", DENSE, "this model has no layer of experts"),
    ],
)
def test_what_no_plan_can_keep_is_refused(fix: str, graph: ModelGraph, message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        searcher_of(fix, graph)
    assert caught.value.hint


@pytest.mark.parametrize(
    "fix", ["etp=1,tp=2", "etp=1,tp=2,ep=4", "tp=2,sp,ep=2", "etp=1,tp=4,zero=3,dp=1", "etp=1,tp=2,cp=2"]
)
def test_the_price_of_a_choice_is_the_price_of_its_plan(fix: str) -> None:
    graph = moe(num_layers=6)
    searcher = searcher_of(fix, graph, ranks=8)
    for limit in (PLENTY, int(0.6 * searcher.best(PLENTY).prediction.peak_bytes)):
        try:
            found = searcher.best(limit)
        except PlanError:
            continue
        for plan, prediction in [
            (found.best, found.prediction),
            *((each.plan, each.prediction) for each in found.runners_up),
        ]:
            check(plan, graph, num_ranks=plan.mesh.world_size, cluster=MACHINE)
            again = predict(graph, plan, MACHINE)
            assert again.step_time_s == pytest.approx(prediction.step_time_s, rel=1e-9)
            assert again.peak_bytes == pytest.approx(prediction.peak_bytes, rel=1e-9)


def test_every_choice_of_experts_is_priced_as_its_plan_is() -> None:
    """Of all orders of the axes, too: experts are dealt out among neighbours."""
    searcher = searcher_of("tp=2,pp=2,mb=1,zero=1", ranks=8)
    num_dealt = 0
    for choice in list(every_choice(searcher))[::7]:
        priced = searcher.pricing.price(choice, PLENTY)
        assert priced is not None
        again = predict(moe(), searcher.as_plan(priced), MACHINE)
        assert again.step_time_s == pytest.approx(priced.seconds, rel=1e-9), choice
        num_dealt += choice.group.ep > 1
    assert num_dealt


def test_a_certificate_over_both_holds() -> None:
    searcher = searcher_of("zero=1")
    found = searcher.best(PLENTY)
    checked = verify_certificate(searcher, found, max_checked=200)
    assert checked.problems == ()
    assert checked.num_choices == found.certificate.enumerated == sum(1 for _ in every_choice(searcher))


def test_the_other_way_of_having_experts_is_told_with_its_price() -> None:
    searcher = searcher_of("tp=2,sp,ep=2")
    found = searcher.best(PLENTY)
    told = {each.change: each for each in alternatives(searcher, found)}
    was, wanted = ("1", "2") if found.best.etp == 1 else ("2", "1")
    other = told[f"etp {was} → {wanted}"]
    assert other.prediction is not None
    assert other.prediction.step_time_s >= found.prediction.step_time_s


def test_a_larger_choice_of_experts_is_never_slower() -> None:
    free = least_s(all_priced(searcher_of("tp=2,mb=1"), PLENTY))
    for fix in ("tp=2,mb=1,etp=1", "tp=2,mb=1,etp=2"):
        least = least_s(all_priced(searcher_of(fix), PLENTY))
        assert free is not None and least is not None and free <= least


def seconds(graph: ModelGraph, text: str, machine: Cluster) -> float:
    request = parse_request(f"dp=8,tp=8,sp,dtype=fp32,{text}")
    plan = complete(request, graph, num_ranks=64, global_batch=16, sequence=4096, cluster=machine)
    return predict(graph, plan, machine).step_time_s


def test_fine_experts_are_faster_whole_than_cut() -> None:
    """Each way a rank holds as many elements of experts: cut in eight, or an eighth as many whole ones."""
    machine = load("h100:64")
    fine = moe(
        number=256, hidden=512, width=2048, chosen=8
    )  # DeepSeek's kind: a product with an eighth of an expert has 64 columns
    coarse = moe(number=8, hidden=8192, width=2048, chosen=2)  # Mixtral's kind
    gain_of_fine = seconds(fine, "ep=8", machine) / seconds(fine, "ep=64,etp=1", machine)
    gain_of_coarse = seconds(coarse, "ep=1", machine) / seconds(coarse, "ep=8,etp=1", machine)
    assert gain_of_fine > 1.5
    assert gain_of_fine > 1.2 * gain_of_coarse


def test_the_shorthand_of_a_plan_with_whole_experts_is_that_plan() -> None:
    found = searcher_of("etp=1,tp=2").best(PLENTY)
    text = shorthand(found.best)
    assert "etp=1" in text
    again = complete(
        parse_request(text), moe(), num_ranks=found.best.mesh.world_size, global_batch=4, sequence=16
    )
    assert (again.etp, again.ep, again.mesh) == (1, found.best.ep, found.best.mesh)
