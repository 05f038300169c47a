"""What to change about a plan that does not fit on several classes of devices: each class holds its ranks, and what is typed finds it."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from tests.runtime.dry_run_cases import SEQUENCE, rehearsed

from shardstage.cluster import Cluster, load
from shardstage.graph import ModelGraph
from shardstage.plan import Plan, check, complete, named_decisions, parse_request
from shardstage.planner import MixedSearcher, cheapest_mixed_fit
from shardstage.program import lower
from shardstage.simulator import peak_bytes, planned_prices

CLUSTER = load("a100-80:2+h100:2")


def plan_of(text: str) -> tuple[ModelGraph, Plan]:
    graph = rehearsed("llama", "dp=2,pp=2,mb=1", 4, 8).graph
    plan = complete(
        parse_request(text), graph, num_ranks=4, global_batch=16, sequence=SEQUENCE, cluster=CLUSTER
    )
    return graph, plan


def peaks(graph: ModelGraph, plan: Plan, cluster: Cluster) -> list[int]:
    """Of each rank, by its simulated program."""
    program, holdings = lower(graph, plan), planned_prices(graph, plan, cluster).holdings
    return [peak_bytes(program, rank, holdings) for rank in range(4)]


def holding(*usable: int) -> Cluster:
    """Of so many bytes that the tensors of a step may take on a device of each class."""
    parts = [
        replace(part, device=replace(part.device, memory_bytes=int(number / 0.92)))
        for part, number in zip(CLUSTER.joined, usable, strict=True)
    ]
    return Cluster.of_parts(tuple(parts), name="small", network=CLUSTER.levels[-1])


@pytest.mark.parametrize("ratios", [(0.7, 10.0), (10.0, 0.7), (0.6, 0.8)])
@pytest.mark.parametrize("text", ["dp=2,pp=2,mb=8", "dp=4,mb=4"])
def test_each_class_holds_its_ranks_and_what_is_typed_finds_the_plan(
    text: str, ratios: tuple[float, float]
) -> None:
    graph, plan = plan_of(text)
    most = max(peaks(graph, plan, CLUSTER))
    usable = [int(ratio * most) for ratio in ratios]
    cluster = holding(*usable)
    fit = cheapest_mixed_fit(graph, cluster, plan)
    assert fit is not None and fit.changes
    check(fit.plan, graph, num_ranks=4, cluster=cluster)
    held = peaks(graph, fit.plan, cluster)
    assert max(held) == fit.peak_bytes
    assert max(held[:2]) <= usable[0] and max(held[2:]) <= usable[1]
    typed = re.fullmatch(
        r'shardstage plan … --fix "runnable,(.*)"( --max-memory ([\d.]+)%)? --out plan.toml', fit.asked
    )
    assert typed is not None
    searcher = MixedSearcher(
        graph,
        cluster,
        global_batch=16,
        sequence=SEQUENCE,
        precision=plan.precision,
        fix=parse_request(typed[1]),
        fixed=named_decisions(typed[1]),
        is_runnable=True,
    )
    share = float(typed[3] or 100) / 100
    found = searcher.best([int(share * capacity) for capacity in searcher.capacities])
    assert found.prediction.step_time_s == pytest.approx(fit.prediction.step_time_s, rel=1e-9)


def test_nothing_is_proposed_where_nothing_fits() -> None:
    graph, plan = plan_of("dp=4,mb=4")
    assert cheapest_mixed_fit(graph, holding(1000, 2**30), plan) is None
