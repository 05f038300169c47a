"""``search``: every mesh and memory saver priced, the fastest plan that fits chosen.

A first, honest search: all of dp × tp × pp × ZeRO × microbatch × recompute × sequence parallel is enumerated; what does not fit into
memory is rejected by its excess, what cannot beat the best by its lower bound, and every other candidate is priced in full. So the
result is the best of what was enumerated *under the cost model*, no more: stages are cut for balanced time, not searched jointly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Final

from shardstage.cluster import Cluster
from shardstage.cost import Prediction, predict_step
from shardstage.errors import PlanError
from shardstage.graph import ModelGraph
from shardstage.plan import Plan, Precision, Request, format_request
from shardstage.plan.complete import ranges
from shardstage.planner.candidates import choices
from shardstage.planner.pricing import Priced, Pricing
from shardstage.units import format_bytes, format_ratio, format_s

__all__ = [
    "AS_FAST_RATIO",
    "Candidate",
    "SearchResult",
    "as_plan",
    "predict_promising",
    "search",
    "usable_bytes",
]

USABLE_MEMORY_RATIO: Final = MappingProxyType({"cuda": 0.92})
"""What a device's memory holds beside tensors of a step: CUDA's context, NCCL's buffers and what the allocator cannot use; our estimate."""

AS_FAST_RATIO: Final = 1.01
"""Times within one per cent are one to a model that errs by more; the simplest of such plans is taken."""

MIN_PRICED: Final = 12
"""So many candidates are priced in full even where their bounds are hopeless, to show what comes after the best."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A plan that was considered: priced, or rejected for a reason. ``text`` is its shorthand."""

    text: str
    prediction: Prediction | None
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """``best`` with its prediction, and all that was considered: priced ones first, then the slow, then the too large; fastest first."""

    best: Plan
    prediction: Prediction
    considered: tuple[Candidate, ...]

    @cached_property
    def alternatives(self) -> tuple[Candidate, ...]:
        """The priced candidates after the best."""
        return tuple(c for c in self.considered if c.prediction is not None)[1:]


def search(
    graph: ModelGraph,
    cluster: Cluster,
    *,
    num_ranks: int,
    global_batch: int,
    sequence: int | None,
    precision: Precision = "float32",
    memory_bytes: int | None = None,
) -> SearchResult:
    """The fastest plan for exactly ``num_ranks`` ranks under the cost model; ``memory_bytes`` is what a rank may hold.

    Raises ``PlanError`` if no plan fits, with the nearest miss.
    """
    if num_ranks > cluster.num_devices:
        raise PlanError(
            f"{num_ranks} ranks need as many devices, and cluster {cluster.name!r} has {cluster.num_devices}",
            hint=f"--cluster {cluster.name}:{num_ranks}",
        )
    limit = memory_bytes or usable_bytes(cluster)
    pricing = Pricing(
        graph, cluster, num_ranks=num_ranks, global_batch=global_batch, sequence=sequence, precision=precision
    )
    priced = [
        pricing.price(choice)
        for choice in choices(graph, cluster, num_ranks, global_batch, sequence, pricing.num_units)
    ]
    if not priced:
        raise PlanError(
            f"a batch of {global_batch} samples cannot be shared by {num_ranks} ranks in any way",
            hint=f"--batch {num_ranks}",
        )
    fitting = [p for p in priced if p.peak_bytes <= limit]
    if not fitting:
        raise _nothing_fits(priced, limit, num_ranks)
    predictions = predict_promising(fitting)
    best = _simplest_of_fastest(predictions)
    return SearchResult(
        best=as_plan(graph, best, precision),
        prediction=predictions[best],
        considered=tuple(_considered(best, predictions, fitting, priced, limit)),
    )


def usable_bytes(cluster: Cluster) -> int:
    """What the tensors of a step may take on a device of the cluster."""
    return int(USABLE_MEMORY_RATIO.get(cluster.device.kind, 1.0) * cluster.device.memory_bytes)


def predict_promising(fitting: Sequence[Priced]) -> dict[Priced, Prediction]:
    """Full prices in the order of the lower bounds, until no bound can beat the best."""
    predictions: dict[Priced, Prediction] = {}
    fastest_s = float("inf")
    for candidate in sorted(fitting, key=lambda p: p.least_step_s):
        if candidate.least_step_s > AS_FAST_RATIO * fastest_s and len(predictions) >= MIN_PRICED:
            break
        predictions[candidate] = predict_step(candidate.profile, candidate.setup, candidate.links)
        fastest_s = min(fastest_s, predictions[candidate].step_time_s)
    return predictions


def _simplest_of_fastest(predictions: dict[Priced, Prediction]) -> Priced:
    fastest_s = min(p.step_time_s for p in predictions.values())
    as_fast = [c for c, p in predictions.items() if p.step_time_s <= AS_FAST_RATIO * fastest_s]
    return min(as_fast, key=lambda c: (c.choice.complexity, predictions[c].step_time_s))


def as_plan(graph: ModelGraph, priced: Priced, precision: Precision) -> Plan:
    """The plan that a priced choice stands for."""
    choice = priced.choice
    return Plan(
        mesh=choice.mesh,
        stages=ranges(graph, priced.positions),
        global_batch=priced.setup.global_batch,
        sequence=priced.setup.sequence,
        microbatch=choice.microbatch,
        shares=choice.shares,
        zero=choice.zero,
        recompute=choice.recompute,
        schedule="1f1b",
        precision=precision,
        is_sequence_parallel=choice.is_sequence_parallel,
    )


def _considered(
    best: Priced,
    predictions: dict[Priced, Prediction],
    fitting: list[Priced],
    priced: list[Priced],
    limit: int,
) -> Iterator[Candidate]:
    best_s = predictions[best].step_time_s
    yield Candidate(text=_text(best), prediction=predictions[best])
    others = [c for c in predictions if c is not best]
    for candidate in sorted(others, key=lambda c: predictions[c].step_time_s):
        prediction = predictions[candidate]
        slower = prediction.step_time_s / best_s - 1
        reason = f"{format_ratio(slower)} slower" if slower > AS_FAST_RATIO - 1 else "as fast, not as simple"
        yield Candidate(text=_text(candidate), prediction=prediction, reason=reason)
    for candidate in sorted((c for c in fitting if c not in predictions), key=lambda c: c.least_step_s):
        reason = f"takes at least {format_s(candidate.least_step_s)}"
        yield Candidate(text=_text(candidate), prediction=None, reason=reason)
    for candidate in sorted((c for c in priced if c.peak_bytes > limit), key=lambda c: c.least_step_s):
        yield Candidate(text=_text(candidate), prediction=None, reason=_excess(candidate, limit))


def _excess(candidate: Priced, limit: int) -> str:
    return (
        f"needs {format_bytes(candidate.peak_bytes)}, {format_bytes(candidate.peak_bytes - limit)} too much"
    )


def _text(candidate: Priced) -> str:
    choice = candidate.choice
    request = Request(
        dp=choice.mesh.dp,
        tp=choice.mesh.tp,
        pp=choice.mesh.pp,
        is_sequence_parallel=choice.is_sequence_parallel,
        zero=choice.zero,
        microbatch=choice.microbatch,
        recompute=choice.recompute,
    )
    return format_request(request)


def _nothing_fits(priced: list[Priced], limit: int, num_ranks: int) -> PlanError:
    nearest = min(priced, key=lambda p: p.peak_bytes)
    factor = -(-nearest.peak_bytes // limit)
    return PlanError(
        f"none of {len(priced)} plans for {num_ranks} ranks fits into {format_bytes(limit)} a rank; the nearest, "
        f"{_text(nearest)}, {_excess(nearest, limit)}",
        hint=f"--ranks {num_ranks * factor}, or --memory {format_bytes(nearest.peak_bytes).replace(' ', '')}",
    )
