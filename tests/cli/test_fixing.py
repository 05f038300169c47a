"""``--fix``: what a search keeps to is kept, all else is refused before a model is captured."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.cost.machines import round_machine
from tests.cost.toy import toy_graph
from tests.planner.brute import all_priced, least_s

from shardstage.cli.app import run
from shardstage.cli.choosing import Question, choose_plan
from shardstage.cli.fixing import KEPT, Fixed, parse_fixed
from shardstage.cluster import load
from shardstage.errors import PlanError
from shardstage.plan import named_decisions, parse_request, shorthand
from shardstage.planner import Searcher

GRAPH = toy_graph(num_layers=6, width=64, hidden=256)
MACHINE = round_machine(8, latency_s=1e-5)
MIXED = load("h100:4 + b200:4")

UNKEPT = ("shares=5/3", "replicate=lm_head.*", "stages=full/none", "schedule=optimal")


def test_decisions_are_told_from_the_wish_for_what_runs() -> None:
    fixed = parse_fixed(" tp=2 , runnable, zero=1 ", plan="auto")
    assert fixed == Fixed(decisions="tp=2,zero=1", is_runnable=True)
    assert fixed.names == {"tp", "zero"}
    assert fixed.request == parse_request("tp=2,zero=1")
    assert parse_fixed("", plan="auto") == Fixed(is_runnable=False)


KEPT_VALUES = (
    *("dp=2", "tp=2", "pp=2", "tp=2,sp=1", "tp=2,sp=0", "zero=3", "mb=2", "recompute=full:1", "cp=2"),
    *("pp=2,schedule=interleaved-1f1b,v=3", "pp=4,schedule=gpipe", "compile"),
    *("recompute=selective,modules=layers.*", "recompute=full:1+selective,modules=*.up"),
    *("grads=bf16", "offload=optimizer", "outer=1,pp=2", "outer=0,pp=2", "zr=2,dp=4", "zr=2,zero=3"),
)


def test_all_that_is_said_to_be_kept_is_tried_here() -> None:
    tried = named_decisions(",".join(KEPT_VALUES))
    assert named_decisions(KEPT) - tried == {"ep", "etp", "precision"}, (
        "experts and what the model is captured in"
    )


@pytest.mark.parametrize("decisions", KEPT_VALUES)
def test_the_plan_that_is_found_has_what_was_fixed(decisions: str) -> None:
    fixed = parse_fixed(decisions, plan="auto")
    question = Question(plan="auto", num_ranks=8, batch=16, sequence=64, precision="float32", fixed=fixed)
    found = parse_request(shorthand(choose_plan(question, GRAPH, MACHINE).plan))
    for name in fixed.names:
        assert getattr(found, name) == getattr(fixed.request, name)


@pytest.mark.parametrize("decision", UNKEPT)
def test_what_no_search_keeps_to_is_refused_with_the_plan_that_it_would_be(decision: str) -> None:
    with pytest.raises(PlanError, match="a search does not choose that, and would not keep to it") as caught:
        parse_fixed(f"tp=2,{decision}", plan="auto")
    assert caught.value.message.startswith(f"--fix {decision}: ")
    assert f"it keeps to {KEPT}" in caught.value.message
    assert (caught.value.hint or "").startswith(f'--plan "tp=2,{decision}"')


@pytest.mark.parametrize("decisions", KEPT_VALUES)
def test_a_mixed_search_finds_a_plan_with_what_was_fixed(decisions: str) -> None:
    fixed = parse_fixed(decisions, plan="auto")
    question = Question(plan="auto", num_ranks=8, batch=16, sequence=64, precision="float32", fixed=fixed)
    found = parse_request(shorthand(choose_plan(question, GRAPH, MIXED).plan))
    for name in fixed.names:
        assert getattr(found, name) == getattr(fixed.request, name)


@pytest.mark.parametrize("decision", ["cp=2", "ep=4", "etp=1", "zr=2", "outer", "dtype=fp16"])
def test_what_is_only_priced_cannot_be_fixed_beside_what_runs(decision: str) -> None:
    with pytest.raises(PlanError, match=f"{decision} is planned and priced, but not run") as caught:
        parse_fixed(f"runnable,pp=2,{decision}", plan="auto")
    assert caught.value.hint == f'--fix "pp=2,{decision}"'
    assert parse_fixed("runnable,cp=1", plan="auto").is_runnable


def test_nothing_can_be_fixed_of_a_plan_that_is_given() -> None:
    with pytest.raises(PlanError, match="--plan tp=2 leaves nothing to search") as caught:
        parse_fixed("zero=1", plan="tp=2")
    assert caught.value.hint == '--plan auto --fix "zero=1"'
    assert parse_fixed("", plan="tp=2") == Fixed(is_runnable=False)


@pytest.mark.parametrize(
    ("fix", "message", "hint"),
    [
        ("nonsense", "--fix nonsense: 'nonsense' is not a key", '--fix "dp=2,tp=2"'),
        ("recompute=full:x", "--fix recompute=full:x: recompute=full:x is not one of", "recompute=full"),
        ("tp=two", "tp=two must be a whole number", '--fix "tp=2"'),
        (
            "recompute=full,modules=*.up",
            "recompute=full has none",
            '--fix "recompute=selective,modules=*.up"',
        ),
        ("shares=5/3", "--fix shares=5/3", '--plan "shares=5/3"'),
    ],
)
def test_a_fix_is_refused_before_the_cluster_or_the_model_is_looked_at(
    fix: str, message: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["plan", "--model", "none-such", "--cluster", "none-such", "--fix", fix]) == 2
    shown = capsys.readouterr().err
    assert message in shown and hint in shown and "none-such" not in shown


@pytest.mark.parametrize("decisions", ["zr=2", "zr=4", "outer", "outer,zr=2"])
def test_a_search_within_what_is_fixed_finds_what_trying_all_of_it_finds(decisions: str) -> None:
    searcher = Searcher(
        GRAPH,
        replace(MACHINE, num_devices=4),
        num_ranks=4,
        global_batch=8,
        sequence=64,
        is_runnable=False,
        fix=parse_request(f"{decisions},mb=2"),
        fixed=named_decisions(f"{decisions},mb=2"),
    )
    result = searcher.best(2**40)
    priced = all_priced(searcher, 2**40)
    assert result.prediction.step_time_s == pytest.approx(least_s(priced), rel=1e-9)
    assert result.certificate.enumerated == len(priced)
    if "zr" in decisions:
        assert {choice.zero.num_ranks for choice in priced} == {int(decisions[-1])}
    if "outer" in decisions:
        assert {choice.mesh.order for choice in priced} == {("dp", "pp", "cp", "tp")}
