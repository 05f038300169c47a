"""``cheapest_mixed_fit``: what to change about a plan for several classes of devices of which one lacks memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from shardstage.cluster import Cluster
from shardstage.cost.offload import host_of
from shardstage.errors import PlanError
from shardstage.graph import ModelGraph
from shardstage.plan import Plan, shorthand
from shardstage.planner.fit import MOST_SIMULATED, Fit, attempts, differences
from shardstage.planner.mixed.search import MixedSearcher

__all__ = ["cheapest_mixed_fit"]


def cheapest_mixed_fit(graph: ModelGraph, cluster: Cluster, plan: Plan) -> Fit | None:
    """The fastest plan for all devices and the same batch of which each class can hold its ranks, on the same mesh where one fits there.

    In the order of ``cheapest_fit``; None where nothing fits. A shorthand does not say how the model is cut for the classes: what is to be
    asked is the search again, with the decisions that it took fixed.
    """
    has_host = all(host_of(part.device) is not None for part in cluster.parts)
    for request, fixed in attempts(plan, has_host=has_host):
        searcher = MixedSearcher(
            graph,
            cluster,
            global_batch=plan.global_batch,
            sequence=plan.sequence,
            precision=plan.precision,
            fix=request,
            fixed=fixed,
            is_runnable=True,
        )
        share = 1.0
        for _ in range(MOST_SIMULATED):
            try:
                found = searcher.find([int(share * capacity) for capacity in searcher.capacities])
            except PlanError:
                break
            if found is None:
                break
            made = replace(found.best, replicate=plan.replicate)
            peaks = _simulated_peaks(graph, made, cluster)
            filled = max(peak / there for peak, there in zip(peaks, searcher.capacities, strict=True))
            if filled <= 1:
                text = shorthand(made, default_precision=plan.precision)
                return Fit(
                    plan=made,
                    text=text,
                    asked=_asked(text, share),
                    changes=(*differences(plan, made), *_dealt_anew(plan, made)),
                    prediction=found.prediction,
                    peak_bytes=max(peaks),
                )
            share = round(share - max(filled - 1, 0.01), 3)
    return None


def _dealt_anew(before: Plan, after: Plan) -> Iterator[str]:
    """Whether classes take other layers or other samples, where the mesh is the same."""
    if before.mesh == after.mesh and before.stages != after.stages:
        yield "layers dealt by class"
    if before.mesh == after.mesh and before.shares != after.shares:
        yield "samples dealt by class"


def _asked(text: str, share: float) -> str:
    """The search that finds this plan within this share of what devices can hold."""
    parts = (part for part in text.split(",") if not part.startswith(("stages=", "recompute=")))
    most = "" if share == 1 else f" --max-memory {100 * share:.1f}%"
    return f'shardstage plan … --fix "runnable,{",".join(parts)}"{most} --out plan.toml'


def _simulated_peaks(graph: ModelGraph, plan: Plan, cluster: Cluster) -> Sequence[int]:
    """Of the fullest rank of each class."""
    from shardstage.program import lower  # a search asks for neither: it starts sooner without them
    from shardstage.simulator import peak_bytes, planned_prices

    program, peaks = lower(graph, plan), [0] * len(cluster.parts)
    holdings = planned_prices(graph, plan, cluster).holdings
    for row in program.rows:
        ranks = [program.mesh.rank(pp=row.pp, dp=dp, tp=tp) for dp in row.dp for tp in row.tp]
        peak = peak_bytes(program, ranks[0], holdings)
        for number in {cluster.part_of(rank) for rank in ranks}:
            peaks[number] = max(peaks[number], peak)
    return peaks
