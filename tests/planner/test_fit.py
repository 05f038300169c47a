"""What to change about a plan that does not fit: the same mesh first, as little as possible, and it does fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.runtime.dry_run_cases import SEQUENCE, rehearsed

from shardstage.cluster import load
from shardstage.graph import ModelGraph
from shardstage.plan import Plan, check, complete, parse_request
from shardstage.planner import cheapest_fit, predict
from shardstage.planner.fit import attempts
from shardstage.program import lower
from shardstage.simulator import peak_bytes, planned_prices

CLUSTER = load("a100-80:4")


def plan_of(text: str, *, batch: int = 16) -> tuple[ModelGraph, Plan]:
    graph = rehearsed("llama", "dp=2,pp=2,mb=1", 4, 8).graph
    plan = complete(
        parse_request(text), graph, num_ranks=4, global_batch=batch, sequence=SEQUENCE, cluster=CLUSTER
    )
    return graph, plan


def peak_of(graph: ModelGraph, plan: Plan) -> int:
    program, holdings = lower(graph, plan), planned_prices(graph, plan, CLUSTER).holdings
    return max(peak_bytes(program, rank, holdings) for rank in range(plan.mesh.world_size))


@pytest.mark.parametrize("share", [0.9, 0.7, 0.5])
def test_what_is_proposed_fits(share: float) -> None:
    graph, plan = plan_of("dp=2,pp=2,mb=8")
    limit = int(share * peak_of(graph, plan))
    fit = cheapest_fit(graph, CLUSTER, plan, limit_bytes=limit)
    assert fit is not None
    check(fit.plan, graph, num_ranks=4, cluster=CLUSTER)
    assert fit.peak_bytes == peak_of(graph, fit.plan) <= limit
    assert fit.changes
    assert fit.plan.global_batch == plan.global_batch
    again = complete(
        parse_request(fit.text), graph, num_ranks=4, global_batch=16, sequence=SEQUENCE, cluster=CLUSTER
    )
    assert (again.mesh, again.zero, again.microbatch) == (
        fit.plan.mesh,
        fit.plan.zero,
        fit.plan.microbatch,
    )
    assert fit.prediction.step_time_s == pytest.approx(
        predict(graph, fit.plan, CLUSTER).step_time_s, rel=0.05
    )


def test_the_mesh_stays_where_it_can() -> None:
    graph, plan = plan_of("dp=2,pp=2,mb=8")
    fit = cheapest_fit(graph, CLUSTER, plan, limit_bytes=int(0.8 * peak_of(graph, plan)))
    assert fit is not None and fit.plan.mesh == plan.mesh
    assert not any("→" in change and change.split()[0] in ("dp", "tp", "pp") for change in fit.changes)


def test_what_was_zero_is_said_so() -> None:
    """It was "zero default → 1"."""
    graph, plan = plan_of("dp=4,mb=4")
    fit = cheapest_fit(graph, CLUSTER, plan, limit_bytes=int(0.8 * peak_of(graph, plan)))
    assert fit is not None and fit.plan.zero
    assert f"zero 0 → {fit.plan.zero}" in fit.changes


def test_offloading_is_the_last_thing_to_be_proposed() -> None:
    _, plan = plan_of("dp=4,mb=4")
    tried = [(request.offload, "tp" in fixed) for request, fixed in attempts(plan)]
    assert tried == [("none", True), ("none", False), ("optimizer", True), ("optimizer", False)]
    asked = replace(plan, offload="optimizer")
    assert [request.offload for request, _ in attempts(asked)] == ["optimizer", "optimizer"]


def test_nothing_is_proposed_where_nothing_fits() -> None:
    graph, plan = plan_of("dp=4,mb=4")
    assert cheapest_fit(graph, CLUSTER, plan, limit_bytes=1000) is None
