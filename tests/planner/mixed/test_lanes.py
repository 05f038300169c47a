"""Prices of given plans on mixed clusters: the slowest pipeline, each class's memory, groups that lie on one class."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.cluster.test_calibration import FOUND
from tests.cost.toy import Experts, toy_graph
from tests.planner.mixed.instances import GRAPH, PLENTY, all_priced, machines, searcher_of

from shardstage.cluster import CAUSES, Cluster
from shardstage.errors import PlanError
from shardstage.graph import ModelGraph
from shardstage.plan import Plan, complete, parse_request
from shardstage.planner import class_peaks, predict, predict_mixed
from shardstage.planner.mixed.lanes import Lane, lanes_of

CLUSTER = machines((2, 1.0), (2, 2.0))
MOE = toy_graph(num_layers=4, width=64, hidden=128, vocab=128, experts=Experts(number=4, hidden=64))


def plan_of(text: str, cluster: Cluster = CLUSTER, batch: int = 8, graph: ModelGraph = GRAPH) -> Plan:
    return complete(
        parse_request(text), graph, num_ranks=cluster.num_devices, global_batch=batch, sequence=64
    )


def test_classes_that_are_alike_cost_what_one_class_does() -> None:
    alike = machines((2, 1.0), (2, 1.0))
    one = replace(alike.part(0), num_devices=4)
    for text in (
        "dp=4",
        "dp=2,pp=2",
        "tp=2,dp=2",
        "pp=2,dp=2,schedule=interleaved-1f1b,v=2",
        "pp=2,dp=2,cp=1",
    ):
        plan = plan_of(text)
        assert predict_mixed(GRAPH, plan, alike).step_time_s == pytest.approx(
            predict(GRAPH, plan, one).step_time_s
        )


def test_the_slowest_pipeline_sets_the_time() -> None:
    even, uneven = plan_of("dp=4", batch=12), plan_of("dp=4,shares=1/1/2/2", batch=12)
    assert lanes_of(uneven, CLUSTER) == (Lane((0,), 2), Lane((1,), 4))
    slow = predict(GRAPH, even, machines((2, 1.0), (2, 1.0))).step_time_s
    assert predict(GRAPH, even, CLUSTER).step_time_s == pytest.approx(slow)
    assert predict(GRAPH, uneven, CLUSTER).step_time_s < slow


def test_a_v_lays_its_last_stages_on_the_first_class() -> None:
    plan = plan_of("dp=1,pp=4,schedule=zb-v")
    assert len(plan.stages) == 8
    (lane,) = lanes_of(plan, CLUSTER)
    assert lane.classes == (0, 0, 1, 1)
    faster_ends = predict(GRAPH, plan, machines((2, 2.0), (2, 1.0)))
    assert faster_ends.stages[7].forward_s < predict(GRAPH, plan, CLUSTER).stages[7].forward_s


def test_the_peak_of_each_class_is_that_of_its_fullest_rank() -> None:
    plan = plan_of("dp=2,pp=2")
    found = predict(GRAPH, plan, CLUSTER)
    assert class_peaks(GRAPH, plan, CLUSTER) == tuple(map(found.rank_peak_bytes, range(2)))
    shares = plan_of("dp=4,shares=1/1/3/3", batch=16)
    slow, fast = class_peaks(GRAPH, shares, CLUSTER)
    assert slow < fast == predict(GRAPH, shares, CLUSTER).peak_bytes


def test_a_tensor_parallel_group_on_two_classes_is_refused() -> None:
    with pytest.raises(PlanError, match="lie on different devices") as caught:
        predict(GRAPH, plan_of("tp=4"), CLUSTER)
    assert caught.value.hint == '--plan "tp=2"'


@pytest.mark.parametrize(
    ("text", "what", "hint"),
    [
        ("cp=4", "context-parallel ranks .* lie on different devices", '--plan "cp=2"'),
        ("dp=4,ep=4", "deal experts out among them and lie on different devices", '--plan "ep=2"'),
    ],
)
def test_ranks_that_share_sequences_or_experts_on_two_classes_are_refused(
    text: str, what: str, hint: str
) -> None:
    with pytest.raises(PlanError, match=what) as caught:
        predict(MOE, plan_of(text, graph=MOE), CLUSTER)
    assert caught.value.hint == hint


@pytest.mark.parametrize(
    "text", ["dp=4,ep=2", "dp=2,cp=2,ep=2", "dp=2,pp=2,ep=2,zero=2", "dp=2,tp=2,ep=2,etp=1,sp"]
)
def test_shared_sequences_and_experts_cost_on_alike_classes_what_they_do_on_one(text: str) -> None:
    alike = machines((2, 1.0), (2, 1.0), latency_s=1e-5)
    one = replace(alike.part(0), num_devices=4)
    plan = plan_of(text, graph=MOE)
    assert predict(MOE, plan, alike).step_time_s == pytest.approx(predict(MOE, plan, one).step_time_s)


FACTORS = dict.fromkeys(CAUSES, 1.0) | {"products": 1.7, "memory": 1.2, "dp": 2.0, "pp": 0.8}


def test_a_calibration_of_all_classes_weighs_the_slowest_pipeline_s_parts() -> None:
    """It was fitted, written, and read by nobody: each class had its own, or none."""
    found = replace(FOUND, factors=FACTORS)
    calibrated = replace(CLUSTER, calibration=found)
    for text in ("dp=4", "dp=2,pp=2", "tp=2,pp=2"):
        plan = plan_of(text)
        bare, corrected = predict(GRAPH, plan, CLUSTER), predict(GRAPH, plan, calibrated)
        assert corrected.parts == bare.parts
        assert corrected.step_time_s == pytest.approx(found.seconds(bare.parts)) != bare.step_time_s
        low_s, _, high_s = found.range_s(bare.parts)
        assert (corrected.step_time_low_s, corrected.step_time_high_s) == pytest.approx((low_s, high_s))


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_search_over_all_classes_goes_by_it(factor: float) -> None:
    """Waiting for dp that takes half or twice as long: no choice is below the best one, which is priced by the factors."""
    calibrated = replace(CLUSTER, calibration=replace(FOUND, factors=FACTORS | {"dp": factor}))
    searcher = searcher_of(calibrated, batch=8)
    found = searcher.best((PLENTY, PLENTY))
    prices = [price.seconds for price in all_priced(searcher, (PLENTY, PLENTY)).values() if price is not None]
    assert found.prediction.step_time_s == pytest.approx(min(prices))
    assert predict(GRAPH, found.best, found.cluster).step_time_s == pytest.approx(min(prices))
    assert found.cluster.calibration == calibrated.calibration
