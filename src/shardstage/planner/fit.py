"""``cheapest_fit``: what to change about a plan that needs more memory than there is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from shardstage.cluster import Cluster
from shardstage.cost import Prediction
from shardstage.cost.offload import host_of
from shardstage.errors import PlanError
from shardstage.graph import ModelGraph
from shardstage.plan import Plan, Request, shorthand
from shardstage.planner.search import Searcher

__all__ = ["MOST_SIMULATED", "Fit", "attempts", "cheapest_fit", "differences"]

MOST_SIMULATED: Final = 4
"""So many plans are lowered to see their memory instruction by instruction, each under a limit that is lower by the last one's excess."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A plan that fits, how it differs (``zero 0 → 1``), and what it costs: ``peak_bytes`` of its fullest rank, simulated.

    ``text`` is its shorthand, ``asked`` what one types for it.
    """

    plan: Plan
    text: str
    asked: str
    changes: tuple[str, ...]
    prediction: Prediction
    peak_bytes: int


def cheapest_fit(graph: ModelGraph, cluster: Cluster, plan: Plan, *, limit_bytes: int) -> Fit | None:
    """The fastest plan for the same ranks and batch that holds at most ``limit_bytes`` a rank, on the same mesh where one fits there.

    Another ZeRO level, recomputation, microbatch or schedule is preferred to another mesh, and another mesh to offloading. None where
    nothing fits.
    """
    for request, fixed in attempts(plan, has_host=host_of(cluster.device) is not None):
        searcher = Searcher(
            graph,
            cluster,
            num_ranks=plan.mesh.world_size,
            global_batch=plan.global_batch,
            sequence=plan.sequence,
            precision=plan.precision,
            fix=request,
            fixed=fixed,
        )
        allowed = limit_bytes
        for _ in range(MOST_SIMULATED):
            try:
                found = searcher.best(allowed)
            except PlanError:
                break
            made = replace(found.best, replicate=plan.replicate)
            peak = _simulated_peak(graph, made, cluster)
            if peak <= limit_bytes:
                text = shorthand(made, default_precision=plan.precision)
                return Fit(
                    plan=made,
                    text=text,
                    asked=f'--plan "{text}"',
                    changes=tuple(differences(plan, made)),
                    prediction=found.prediction,
                    peak_bytes=peak,
                )
            allowed -= max(peak - limit_bytes, limit_bytes // 100)
    return None


def attempts(plan: Plan, *, has_host: bool = True) -> Iterator[tuple[Request, frozenset[str]]]:
    """What is asked of a search, and what of that it may not change: the least change first."""
    asked = Request(
        tp=plan.mesh.tp,
        pp=plan.mesh.pp,
        dp=plan.mesh.dp,
        offload=plan.offload,
        is_compiled=plan.is_compiled,
        recompute_modules=plan.recompute_modules,
    )
    offloading = (replace(asked, offload="optimizer"),) if has_host else ()
    for request in dict.fromkeys((asked, *offloading)):
        yield request, frozenset({"tp", "pp", "dp", "offload"})
        yield request, frozenset({"offload"})


def _simulated_peak(graph: ModelGraph, plan: Plan, cluster: Cluster) -> int:
    from shardstage.program import lower  # a search asks for neither: it starts sooner without them
    from shardstage.simulator import peak_bytes, planned_prices

    program = lower(graph, plan)
    holdings = planned_prices(graph, plan, cluster).holdings
    ranks = (program.mesh.rank(pp=row.pp, dp=row.dp[0], tp=row.tp[0]) for row in program.rows)
    return max(peak_bytes(program, rank, holdings) for rank in ranks)


def differences(before: Plan, after: Plan) -> Iterator[str]:
    """Each decision of two plans for the same ranks that differs, as ``zero 0 → 1``."""
    for axis in ("dp", "tp", "pp"):
        old, new = getattr(before.mesh, axis), getattr(after.mesh, axis)
        if old != new:
            yield f"{axis} {old} → {new}"
    for name, what in (
        ("zero", "zero"),
        ("recompute", "recompute"),
        ("stage_recompute", "recompute by stage"),
        ("recompute_modules", "modules"),
        ("microbatch", "mb"),
        ("schedule", "schedule"),
        ("gradient_dtype", "grads"),
        ("offload", "offload"),
    ):
        old, new = getattr(before, name), getattr(after, name)
        if old != new:
            yield f"{what} {_told(old)} → {_told(new)}"
    if before.is_sequence_parallel != after.is_sequence_parallel:
        yield "sp" if after.is_sequence_parallel else "no sp"


def _told(value: object) -> str:
    if isinstance(value, tuple):
        return "/".join(map(str, value)) or "default"
    return "default" if value is None else str(value)
