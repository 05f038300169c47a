"""Schedules of a plan: named ones at its sizes, written ones as they are, searched ones never slower than named ones."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shardstage.cluster import load
from shardstage.errors import PlanError
from shardstage.graph import ModelGraph
from shardstage.graph.capture import capture
from shardstage.graph.source import load_model
from shardstage.plan import Plan, check, complete, parse_request, plan_from_toml, plan_to_toml
from shardstage.plan.schedule import schedule_of
from shardstage.planner.predict import predict


@pytest.fixture(scope="module")
def graph() -> ModelGraph:
    return capture(load_model("llama-tiny"), sequence=31)


def plan_of(graph: ModelGraph, text: str, num_ranks: int = 3, **options: object) -> Plan:
    return complete(
        parse_request(text),
        graph,
        num_ranks=num_ranks,
        global_batch=7,
        sequence=31,
        **options,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("text", "num_stages", "stage_ranks"),
    [
        ("pp=3", 3, (0, 1, 2)),
        ("pp=3,schedule=zb-h1", 3, (0, 1, 2)),
        ("pp=3,schedule=interleaved-1f1b", 6, (0, 1, 2, 0, 1, 2)),
        ("pp=3,schedule=looped-bfs,v=3", 9, (0, 1, 2) * 3),
        ("pp=3,schedule=zb-v", 6, (0, 1, 2, 2, 1, 0)),
    ],
)
def test_a_schedule_says_how_many_stages_there_are_and_where(
    graph: ModelGraph, text: str, num_stages: int, stage_ranks: tuple[int, ...]
) -> None:
    plan = plan_of(graph, f"{text},mb=1")
    assert len(plan.stages) == num_stages
    assert schedule_of(plan).stage_ranks == stage_ranks
    check(plan, graph)


def test_stages_that_a_schedule_does_not_take_are_refused(graph: ModelGraph) -> None:
    plan = plan_of(graph, "pp=3,mb=1,v=2,schedule=1f1b")
    with pytest.raises(PlanError, match="schedule 1f1b: 1f1b runs exactly one stage on each rank") as error:
        check(plan, graph)
    assert error.value.hint == '--plan "pp=3,schedule=1f1b,v=1"'
    plan = replace(plan_of(graph, "pp=3,mb=1"), stages=plan_of(graph, "pp=3,mb=1").stages[:2])
    with pytest.raises(PlanError, match="lists 2 stages, and pp is 3"):
        check(plan, graph)


def test_a_searched_schedule_is_written_into_the_plan_and_never_slower_than_named_ones(
    graph: ModelGraph,
) -> None:
    cluster = load("a100-80:4")
    found = plan_of(graph, "pp=3,mb=1,schedule=optimal", cluster=cluster)
    assert found.schedule == "custom" and len(found.actions) == 3
    check(found, graph, cluster=cluster)
    assert plan_from_toml(plan_to_toml(found)) == found
    best_s = predict(graph, found, cluster).step_time_s
    for name in ("gpipe", "1f1b", "zb-h1"):
        named = plan_of(graph, f"pp=3,mb=1,schedule={name}")
        assert best_s <= predict(graph, named, cluster).step_time_s * (1 + 1e-9)


def test_actions_of_other_sizes_are_refused(graph: ModelGraph) -> None:
    found = plan_of(graph, "pp=3,mb=1,schedule=optimal")
    with pytest.raises(PlanError, match="actions are for 3 ranks, 3 stages and 7 microbatches"):
        check(replace(found, microbatch=2), graph)
    with pytest.raises(PlanError, match="schedule custom"):
        check(replace(found, actions=("0F0 0B0", "1B0 1F0", "2F0 2B0")), graph)


def test_without_stages_there_is_nothing_to_order(graph: ModelGraph) -> None:
    assert plan_of(graph, "dp=3,schedule=optimal").schedule == "1f1b"
