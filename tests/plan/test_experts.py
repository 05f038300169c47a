"""Expert tensor parallelism as a decision: typed, kept, refused where it cannot be."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.cost.toy import Experts, toy_graph

from shardstage.cluster import load
from shardstage.errors import PlanError
from shardstage.graph import ModelGraph
from shardstage.plan import (
    Plan,
    check,
    complete,
    explain,
    parse_request,
    plan_from_toml,
    plan_to_toml,
    shorthand,
)
from shardstage.plan.check import require_runnable

MOE = toy_graph(num_layers=3, width=64, hidden=256, vocab=128, experts=Experts(number=8, hidden=32))
DENSE = toy_graph(num_layers=3)


def plan_of(text: str, graph: ModelGraph = MOE, *, ranks: int = 8) -> Plan:
    return complete(parse_request(text), graph, num_ranks=ranks, global_batch=16, sequence=64)


def test_whole_experts_survive_file_and_shorthand() -> None:
    plan = plan_of("tp=4,sp,ep=8,etp=1,mb=2")
    assert (plan.ep, plan.etp, plan.mesh.dp) == (8, 1, 2)
    assert plan_from_toml(plan_to_toml(plan)) == plan
    assert "ep = 8\netp = 1\n" in plan_to_toml(plan)
    assert shorthand(plan) == "dp=2,tp=4,sp,mb=2,ep=8,etp=1,dtype=float32"
    assert plan_of(shorthand(plan)) == plan
    assert check(plan, MOE, num_ranks=8) == ()


def test_experts_cut_over_all_tensor_parallel_ranks_need_not_be_said() -> None:
    assert plan_of("tp=4,etp=4") == plan_of("tp=4")
    assert "etp" not in plan_to_toml(plan_of("tp=4,etp=4"))


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        (
            "tp=4,etp=2",
            "etp=2 cannot be: an expert is cut over all 4 tensor-parallel ranks, or whole",
            "tp=4,etp=1",
        ),
        ("tp=2,etp=4", "etp=4 cannot be: an expert is cut over all 2", "tp=2,etp=1"),
        ("etp=1", "with tp=1 none does", "leave out etp"),
        ("tp=2,etp=0", "etp=0 must be a whole number of at least 1", "etp=2"),
    ],
)
def test_other_numbers_are_refused(text: str, message: str, hint: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        plan_of(text)
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("text", "graph", "message", "hint"),
    [
        ("tp=4,etp=1", DENSE, "this model has no layer of experts", "leave out etp=1"),
        (
            "tp=4,etp=1",
            MOE.at(microbatch=4, sequence=64),
            "has no layer of experts whose tokens can be dealt out",
            "leave out",
        ),
        (
            "tp=2,dp=4,ep=3,etp=1",
            MOE,
            "ep=3 ranks cannot have equally many of 8 experts",
            "leave out ep=3",
        ),
        (
            "tp=2,dp=2,pp=2,ep=8,etp=1",
            MOE,
            r"ep=8 does not divide the 4 ranks \(tp=2 × 2 replicas\)",
            "ep=4,etp=1",
        ),
        ("ep=3", MOE, "ep=3 ranks cannot have equally many of 8 experts", "leave out ep=3"),
        ("ep=16", MOE, "ep=16 ranks cannot have equally many of 8 experts", "ep=8"),
        ("tp=4,dp=2,ep=4", MOE, "ep=4 does not divide the 2 replicas that", '"...,ep=4,etp=1", or ep=2'),
        ("dp=4,pp=2,ep=8", MOE, "ep=8 does not divide the 4 replicas that", "ep=4"),
        ("tp=2,dp=2,pp=2,outer,etp=1", MOE, "replicas are no neighbours", "leave out outer"),
    ],
)
def test_plans_whose_experts_cannot_be_whole_are_refused(
    text: str, graph: ModelGraph, message: str, hint: str
) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        check(plan_of(text, graph), graph)
    assert hint in (caught.value.hint or "")


def test_a_plan_file_without_tensor_parallel_ranks_cannot_leave_experts_whole_on_them() -> None:
    with pytest.raises(PlanError, match="etp=1 leaves experts whole on tensor-parallel ranks, and tp is 1"):
        check(replace(plan_of("dp=8"), etp=1), MOE)
    written = plan_to_toml(plan_of("tp=4,etp=1")).replace("etp = 1", "etp = 2")
    with pytest.raises(PlanError, match="etp must be one of 1, not 2"):
        plan_from_toml(written)


def test_whole_experts_are_priced_on_several_classes_of_devices() -> None:
    check(plan_of("tp=4,etp=1"), MOE, cluster=load("a100-40:4+h100:4"))


def test_whole_experts_are_planned_but_not_run() -> None:
    require_runnable(plan_of("tp=4"))
    with pytest.raises(PlanError, match=r"leaves whole \(etp=1\) is planned and priced, but not run"):
        require_runnable(plan_of("tp=4,etp=1"))


def test_an_explained_plan_says_who_has_experts() -> None:
    cut, whole = explain(plan_of("tp=2,sp"), MOE), explain(plan_of("tp=2,sp,ep=8,etp=1"), MOE)
    assert "experts dealt out to 8 ranks, whole experts on tensor-parallel ranks" in whole
    assert "experts" not in cut.splitlines()[2]
    talk = [line.split() for line in whole.splitlines() if line.startswith("  tp ")]
    assert talk and talk != [line.split() for line in cut.splitlines() if line.startswith("  tp ")]
