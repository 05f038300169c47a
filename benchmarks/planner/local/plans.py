"""The plans that are measured: a grid of what runs on four ranks, the best of every mesh by prediction, and the pick."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from shardstage.cluster import Cluster
from shardstage.errors import PlanError
from shardstage.graph import ModelGraph
from shardstage.plan import Plan, Request, check, complete, parse_request, shorthand
from shardstage.plan.check import require_runnable
from shardstage.planner import Searcher, predict, usable_bytes

__all__ = ["NUM_RANKS", "Candidate", "candidates"]

NUM_RANKS = 4

GRID = (
    *("dp=4,mb=4", "dp=4,mb=2", "dp=4,mb=4,zero=1", "dp=4,mb=4,zero=3", "dp=4,mb=4,recompute=full"),
    *(
        "dp=2,tp=2,mb=8",
        "dp=2,tp=2,mb=4",
        "dp=2,tp=2,mb=8,sp",
        "dp=2,tp=2,mb=8,zero=1",
        "dp=2,tp=2,mb=8,zero=3",
    ),
    *("tp=4,mb=16", "tp=4,mb=16,sp"),
    *("dp=2,pp=2,mb=8", "dp=2,pp=2,mb=4", "dp=2,pp=2,mb=2", "dp=2,pp=2,mb=4,zero=1", "dp=2,pp=2,mb=4,zero=3"),
    *("dp=2,pp=2,mb=2,schedule=zb-h1", "dp=2,pp=2,mb=2,schedule=interleaved-1f1b,v=2"),
    *("tp=2,pp=2,mb=16", "tp=2,pp=2,mb=8", "tp=2,pp=2,mb=4", "tp=2,pp=2,mb=4,schedule=zb-h1"),
    *("pp=4,mb=8", "pp=4,mb=4", "pp=4,mb=2", "pp=4,mb=2,recompute=full"),
    *("pp=4,mb=2,schedule=zb-h1", "pp=4,mb=2,schedule=zb-v", "pp=4,mb=2,schedule=interleaved-1f1b,v=2"),
)
"""Every mesh of four ranks; of each what its choices are about: microbatch, ZeRO, sp, schedule, recomputation. For a batch of 16."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A plan that is measured; ``is_pick`` marks the planner's."""

    text: str
    plan: Plan
    predicted_s: float
    is_pick: bool


def candidates(
    graph: ModelGraph, cluster: Cluster, *, global_batch: int, sequence: int | None, only: int | None
) -> list[Candidate]:
    """The pick first, the runners-up, then the grid, each plan once; ``only`` keeps at most so many, evenly."""
    searcher = Searcher(
        graph,
        cluster,
        num_ranks=NUM_RANKS,
        global_batch=global_batch,
        sequence=sequence,
        is_runnable=True,
    )
    found = searcher.best(usable_bytes(cluster))
    chosen = [found.best, *(other.plan for other in found.runners_up)]
    plans = list(dict.fromkeys([*chosen, *_grid(graph, global_batch, sequence)]))
    plans = plans[:: -(-len(plans) // only)] if only else plans
    for plan in plans:
        require_runnable(plan)
    return [
        Candidate(
            text=shorthand(plan, default_precision="float32"),
            plan=plan,
            predicted_s=predict(graph, plan, cluster).step_time_s,
            is_pick=plan == found.best,
        )
        for plan in plans
    ]


def _grid(graph: ModelGraph, global_batch: int, sequence: int | None) -> Iterator[Plan]:
    for request in map(parse_request, GRID):
        if (plan := _completed(request, graph, global_batch, sequence)) is not None:
            yield plan


def _completed(request: Request, graph: ModelGraph, global_batch: int, sequence: int | None) -> Plan | None:
    """The plan, or None where the model cannot be cut so."""
    try:
        plan = complete(request, graph, num_ranks=NUM_RANKS, global_batch=global_batch, sequence=sequence)
        check(plan, graph, num_ranks=NUM_RANKS)
    except PlanError:
        return None
    return plan
