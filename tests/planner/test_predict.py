"""The price of a plan that somebody wrote."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.cost.machines import round_machine
from tests.cost.toy import toy_graph

from shardstage.errors import PlanError
from shardstage.plan import Plan, StageRange, complete, parse_request
from shardstage.planner import predict

GRAPH = toy_graph(num_layers=6, width=64)
MACHINE = round_machine(8)


def plan_of(text: str, *, ranks: int = 4) -> Plan:
    return complete(parse_request(text), GRAPH, num_ranks=ranks, global_batch=16, sequence=64)


@pytest.mark.parametrize(
    "text", ["", "tp=2", "pp=2", "tp=2,pp=2,sp", "dp=4,zero=3", "pp=4,schedule=gpipe,recompute=full"]
)
def test_every_kind_of_plan_has_a_price(text: str) -> None:
    prediction = predict(GRAPH, plan_of(text), MACHINE)
    assert prediction.step_time_s > 0 and prediction.peak_bytes > 0
    assert len(prediction.stages) == plan_of(text).mesh.pp


def test_a_stage_may_begin_within_a_layer() -> None:
    plan = plan_of("pp=2", ranks=2)
    cut = (StageRange(first="embed", last="up_2"), StageRange(first="relu_2", last="loss"))
    assert predict(GRAPH, replace(plan, stages=cut), MACHINE).step_time_s > 0


def test_uneven_shares_cost_what_the_largest_costs() -> None:
    even, uneven = plan_of("mb=1", ranks=2), plan_of("shares=3/1,mb=1", ranks=2)
    uneven = replace(uneven, microbatch=3)
    assert uneven.shares == (12, 4)
    assert predict(GRAPH, uneven, MACHINE).step_time_s > predict(GRAPH, even, MACHINE).step_time_s


def test_an_unbalanced_pipeline_is_slower() -> None:
    plan = plan_of("pp=2", ranks=2)
    lopsided = (StageRange(first="embed", last="add_0"), StageRange(first="up_1", last="loss"))
    worse = predict(GRAPH, replace(plan, stages=lopsided), MACHINE)
    assert worse.step_time_s > predict(GRAPH, plan, MACHINE).step_time_s


def test_a_plan_for_more_ranks_than_devices_has_no_price() -> None:
    with pytest.raises(PlanError, match="for 16 ranks, and cluster 'round' has 8") as caught:
        predict(GRAPH, plan_of("", ranks=16), MACHINE)
    assert caught.value.hint == "--cluster round:16"
