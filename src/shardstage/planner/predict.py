"""``predict``: what a given plan is expected to take on a cluster."""

from __future__ import annotations

from collections.abc import Sequence

from shardstage.cluster import Cluster, more_devices
from shardstage.cost import Prediction, fold, predict_step
from shardstage.errors import PlanError
from shardstage.graph import ModelGraph
from shardstage.plan import Plan
from shardstage.plan.order import profile_of, setup_of
from shardstage.plan.schedule import schedule_of

__all__ = ["predict"]


def predict(graph: ModelGraph, plan: Plan, cluster: Cluster, *, units: Sequence[int] = ()) -> Prediction:
    """Step time and memory of a checked plan.

    Priced is the data-parallel rank with the largest share, which the others wait for. ``units`` are ops at which a unit begins, beside
    those of blocks and stages: a search cuts a model of few blocks into smaller ones. Raises ``PlanError`` if the cluster is smaller than
    the plan.
    """
    if plan.mesh.world_size > cluster.num_devices:
        raise PlanError(
            f"the plan is for {plan.mesh.world_size} ranks, and cluster {cluster.name!r} has {cluster.num_devices} devices",
            hint=more_devices(cluster, plan.mesh.world_size),
        )
    if cluster.is_mixed:
        from shardstage.planner.mixed import predict_mixed  # seldom asked for, and long to load

        return predict_mixed(graph, plan, cluster, units=units)
    positions = {op.name: index for index, op in enumerate(graph.ops)}
    boundaries = tuple(positions[stage.first] for stage in plan.stages)
    folded = fold(graph, boundaries=(*boundaries, *units), modules=plan.recompute_modules)
    custom = schedule_of(plan) if plan.schedule == "custom" else None
    setup = setup_of(plan, folded, tuple(folded.unit_at(position) for position in boundaries), custom)
    priced, links = profile_of(plan, folded, setup, cluster)
    return predict_step(priced, setup, links)
