"""A small model under a plan on a machine with round numbers: its program, its prices, and what the analytic model says."""

from __future__ import annotations

from typing import NamedTuple

from tests.cost.machines import round_machine
from tests.cost.toy import toy_graph

from shardstage.cluster import Cluster
from shardstage.cost import Links, Prediction, fold, predict_step, profile
from shardstage.cost.step import CALIBRATIONS
from shardstage.graph import ModelGraph
from shardstage.plan import Plan, complete, parse_request
from shardstage.plan.explain import setup_of
from shardstage.plan.schedule import schedule_of
from shardstage.program import Program, lower
from shardstage.simulator import PlannedPrices, planned_prices

GRAPH = toy_graph(num_layers=8, width=64, hidden=256, vocab=256)
CLUSTER = round_machine(8, latency_s=1e-6)


class Planned(NamedTuple):
    plan: Plan
    program: Program
    prices: PlannedPrices


def planned(
    text: str, *, num_ranks: int = 4, graph: ModelGraph = GRAPH, cluster: Cluster = CLUSTER
) -> Planned:
    plan = complete(parse_request(text), graph, num_ranks=num_ranks, global_batch=32, sequence=64)
    return Planned(plan, lower(graph, plan), planned_prices(graph, plan, cluster))


def analytic(
    plan: Plan, cluster: Cluster = CLUSTER, *, graph: ModelGraph = GRAPH
) -> tuple[Prediction, float]:
    """The cost model's prediction, and its seconds before they are calibrated.

    The schedule is run action by action: named ones have formulas, which unlike stages follow to a few per cent only.
    """
    positions = {op.name: index for index, op in enumerate(graph.ops)}
    boundaries = tuple(positions[stage.first] for stage in plan.stages)
    folded = fold(graph, boundaries=boundaries, modules=plan.recompute_modules)
    starts = tuple(folded.unit_at(position) for position in boundaries)
    setup = setup_of(plan, folded, starts, schedule_of(plan))
    priced = profile(
        folded,
        cluster,
        tp=plan.mesh.tp,
        microbatch=setup.microbatch,
        sequence=64,
        is_sequence_parallel=plan.is_sequence_parallel,
        is_compiled=plan.is_compiled,
    )
    prediction = predict_step(priced, setup, Links(cluster, plan.mesh))
    return prediction, prediction.step_time_s / CALIBRATIONS["cuda"].expected
