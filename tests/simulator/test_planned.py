"""Prices of a plan on a described cluster: the simulation of them is what the analytic model says where that is exact."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.cost.toy import toy_graph
from tests.simulator.planned_cases import CLUSTER, GRAPH, analytic, planned

from shardstage.cost import Links
from shardstage.errors import PlanError
from shardstage.simulator import planned_prices, simulate, step_time

WIDE_VOCABULARY = toy_graph(num_layers=4, width=64, hidden=128, vocab=4096)


@pytest.mark.parametrize(
    "text",
    [
        "pp=4,mb=2",
        "pp=4,mb=2,schedule=gpipe",
        "pp=2,tp=2,mb=2",
        "pp=4,mb=2,recompute=full",
        "pp=4,mb=4,recompute=selective",
        "pp=4,mb=2,recompute=full:1",
        "pp=4,mb=2,stages=full/full:1+selective/selective:1/none",
        "pp=4,mb=2,offload=optimizer",
        "pp=4,mb=2,schedule=zb-h1",
        "pp=4,mb=2,schedule=zb-h1,recompute=full",
        "pp=4,mb=4,schedule=zb-v,recompute=selective",
        "pp=2,tp=2,mb=2,schedule=dualpipe-v",
    ],
)
def test_without_data_parallel_ranks_the_simulation_equals_the_analytic_model(text: str) -> None:
    plan, program, prices = planned(text)
    assert step_time(program, prices) == pytest.approx(analytic(plan)[1], rel=1e-4)


@pytest.mark.parametrize(
    "text",
    [
        "pp=2,dp=2,mb=2",
        "pp=2,dp=2,mb=2,zero=1",
        "pp=2,dp=2,mb=2,zero=2",
        "pp=2,dp=2,mb=2,zero=3",
        "pp=2,dp=2,mb=2,zero=1,offload=optimizer",
        "pp=2,dp=2,mb=2,zero=2,offload=optimizer",
    ],
)
def test_with_them_it_is_near_and_never_faster_than_compute(text: str) -> None:
    """The analytic model hides all but the last bucket; the simulation begins each bucket when its backward has filled it."""
    plan, program, prices = planned(text)
    assert step_time(program, prices) == pytest.approx(analytic(plan)[1], rel=0.02)
    busy = max(simulate(program, prices).busy_s(rank) for rank in range(4))
    assert step_time(program, prices) > busy


@pytest.mark.parametrize(
    "text",
    [
        "dp=4,mb=2,zero=2",
        "dp=4,mb=2,zero=3",
        "dp=4,mb=2,zero=3,recompute=full",
        "dp=2,tp=2,mb=2,zero=2",
        "dp=2,tp=2,mb=2,zero=3",
        "dp=2,pp=2,mb=2,zero=2",
        "dp=2,pp=2,mb=2,zero=3",
    ],
)
def test_blocks_sharded_over_data_parallel_ranks_take_what_the_formula_says(text: str) -> None:
    plan, program, prices = planned(text, graph=WIDE_VOCABULARY)
    assert step_time(program, prices) == pytest.approx(analytic(plan, graph=WIDE_VOCABULARY)[1], rel=1e-3)


@pytest.mark.parametrize(
    "text", ["dp=4,mb=8,zero=2", "dp=4,mb=2,zero=2", "dp=4,mb=8,zero=3", "dp=4,mb=2,zero=3"]
)
def test_what_units_share_is_gathered_once_and_summed_with_every_microbatch(text: str) -> None:
    """A tied embedding under ZeRO-2/3 was once free in the analytic model: of a GPT on four CPU ranks it took a quarter of the step.

    Nothing runs beside its gather, nor beside the sum of its gradients, which the simulation once let run beside the end of the backward.
    """
    tied = toy_graph(num_layers=4, width=64, hidden=128, vocab=4096, is_tied=True)
    plan, program, prices = planned(text, graph=tied)
    num_bytes = 4 * 4096 * 64
    (num_microbatches,) = {len(plan.microbatches(dp)) for dp in range(4)}
    assert step_time(program, prices) == pytest.approx(analytic(plan, graph=tied)[1], rel=2e-3)
    slow = replace(CLUSTER, levels=tuple(replace(level, bytes_per_s=2e7) for level in CLUSTER.levels))
    replicas = Links(slow, plan.mesh).replicas
    least_s = replicas.shards_s("all_gather", num_bytes) + num_microbatches * replicas.scatter_s(num_bytes)
    assert analytic(plan, slow, graph=tied)[0].exposed_dp_s > least_s


def test_halves_of_a_backward_make_the_whole() -> None:
    _, _, prices = planned("pp=4,mb=2,schedule=zb-h1")
    for stage in range(4):
        whole, one, other = (prices.compute_s(0, stage, kind, 2) for kind in ("B", "I", "W"))
        assert whole == pytest.approx(one + other)
        assert 0.2 * whole < other < 0.6 * whole, "one product of two, and nothing of what is no product"


def test_a_split_backward_shortens_the_step() -> None:
    whole, split = planned("pp=4,mb=2"), planned("pp=4,mb=2,schedule=zb-h1")
    assert step_time(split.program, split.prices) < step_time(whole.program, whole.prices)


def test_every_schedule_of_a_model_can_be_simulated() -> None:
    for text in ("schedule=interleaved-1f1b", "schedule=zb-v", "schedule=dualpipe-v", "schedule=looped-bfs"):
        _, program, prices = planned(f"pp=2,dp=2,mb=2,{text}")
        timeline = simulate(program, prices, prices.holdings)
        assert timeline.step_time_s == pytest.approx(step_time(program, prices))
        assert timeline.alike == {0: (0, 1), 2: (2, 3)}


def test_uneven_shares_make_classes_of_ranks() -> None:
    _, program, prices = planned("pp=2,dp=2,mb=2,shares=18/14,zero=1")
    timeline = simulate(program, prices)
    assert timeline.ranks == (0, 1, 2, 3)
    assert timeline.busy_s(0) > timeline.busy_s(1)


def test_a_cluster_that_is_too_small_is_refused() -> None:
    plan, _, _ = planned("pp=4,mb=2")
    with pytest.raises(PlanError, match="the plan is for 4 ranks") as caught:
        planned_prices(GRAPH, plan, CLUSTER.with_devices(2))
    assert caught.value.hint == "--cluster round:4"
