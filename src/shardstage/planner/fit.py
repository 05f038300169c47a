"""``cheapest_fit``: what to change about a plan that needs more memory than there is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Final

from shardstage.cluster import Cluster
from shardstage.cost import Prediction
from shardstage.graph import ModelGraph
from shardstage.plan import Plan, shorthand
from shardstage.planner.candidates import choices
from shardstage.planner.pricing import Priced, Pricing
from shardstage.planner.search import AS_FAST_RATIO, as_plan, predict_promising
from shardstage.program import lower
from shardstage.simulator import peak_bytes, planned_prices

__all__ = ["Fit", "cheapest_fit"]

MOST_SIMULATED: Final = 4
"""So many candidates, fastest first, are lowered to see their memory instruction by instruction before the next group has its turn."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A plan that fits, how it differs (``zero 0 → 1``), and what it costs: ``peak_bytes`` of its fullest rank, simulated."""

    plan: Plan
    text: str
    changes: tuple[str, ...]
    prediction: Prediction
    peak_bytes: int


def cheapest_fit(graph: ModelGraph, cluster: Cluster, plan: Plan, *, limit_bytes: int) -> Fit | None:
    """The fastest plan for the same ranks and batch that holds at most ``limit_bytes`` a rank; of those as fast, the likest.

    Another ZeRO level, recomputation, microbatch or sequence parallelism is preferred to another mesh. None where nothing fits.
    """
    pricing = Pricing(
        graph,
        cluster,
        num_ranks=plan.mesh.world_size,
        global_batch=plan.global_batch,
        sequence=plan.sequence,
        precision=plan.precision,
    )
    every = choices(graph, cluster, plan.mesh.world_size, plan.global_batch, plan.sequence, pricing.num_units)
    fitting = [priced for choice in every if (priced := pricing.price(choice)).peak_bytes <= limit_bytes]
    same_mesh = [priced for priced in fitting if priced.choice.mesh == plan.mesh]
    for group in (same_mesh, fitting):
        for priced, prediction in islice(_in_order(group, plan), MOST_SIMULATED):
            made = replace(
                as_plan(graph, priced, plan.precision), replicate=plan.replicate, is_compiled=plan.is_compiled
            )
            peak = _simulated_peak(graph, made, cluster)
            if peak <= limit_bytes:
                return Fit(
                    plan=made,
                    text=shorthand(made, default_precision=plan.precision),
                    changes=tuple(_changes(plan, made)),
                    prediction=prediction,
                    peak_bytes=peak,
                )
    return None


def _in_order(group: Sequence[Priced], plan: Plan) -> Iterator[tuple[Priced, Prediction]]:
    """Fastest first, but those within a per cent of the fastest by how little they change."""
    if not group:
        return
    predictions = predict_promising(group)
    fastest_s = min(prediction.step_time_s for prediction in predictions.values())

    def rank(item: tuple[Priced, Prediction]) -> tuple[bool, int, float]:
        step_s = item[1].step_time_s
        is_as_fast = step_s <= AS_FAST_RATIO * fastest_s
        return not is_as_fast, _num_changes(item[0], plan) if is_as_fast else 0, step_s

    yield from sorted(predictions.items(), key=rank)


def _num_changes(priced: Priced, plan: Plan) -> int:
    choice = priced.choice
    return sum(
        (
            choice.mesh.tp != plan.mesh.tp,
            choice.mesh.pp != plan.mesh.pp,
            choice.zero != plan.zero,
            choice.recompute != plan.recompute,
            choice.is_sequence_parallel != plan.is_sequence_parallel,
            priced.setup.microbatch != plan.microbatch,
        )
    )


def _simulated_peak(graph: ModelGraph, plan: Plan, cluster: Cluster) -> int:
    program = lower(graph, plan)
    holdings = planned_prices(graph, plan, cluster).holdings
    ranks = (program.mesh.rank(pp=row.pp, dp=row.dp[0], tp=row.tp[0]) for row in program.rows)
    return max(peak_bytes(program, rank, holdings) for rank in ranks)


def _changes(before: Plan, after: Plan) -> Iterator[str]:
    for axis in ("dp", "tp", "pp"):
        old, new = getattr(before.mesh, axis), getattr(after.mesh, axis)
        if old != new:
            yield f"{axis} {old} → {new}"
    for name, what in (
        ("zero", "zero"),
        ("recompute", "recompute"),
        ("microbatch", "mb"),
        ("schedule", "schedule"),
    ):
        old, new = getattr(before, name), getattr(after, name)
        if old != new:
            yield f"{what} {old} → {new}"
    if before.is_sequence_parallel != after.is_sequence_parallel:
        yield "sp" if after.is_sequence_parallel else "no sp"
