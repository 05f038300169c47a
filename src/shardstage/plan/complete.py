"""``complete``: from what was typed to a plan in which nothing is open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final, Literal, NamedTuple

from shardstage.cluster import Cluster
from shardstage.cost.balance import balanced, slowest
from shardstage.cost.compute import RELATIVE, op_time
from shardstage.cost.fold import Folded, fold
from shardstage.errors import PlanError
from shardstage.graph import ModelGraph
from shardstage.graph.cuts import all_crossing_bytes, good_positions
from shardstage.graph.recompute import StageRecompute
from shardstage.layout import AXES, Mesh
from shardstage.plan.order import with_optimal_order
from shardstage.plan.plan import Plan, Precision, StageRange
from shardstage.plan.shorthand import Request

__all__ = [
    "complete",
    "cut_stages",
    "default_microbatch",
    "proportional_shares",
    "ranges",
    "sized",
    "unit_weights",
]

MAX_MICROBATCH_TOKENS: Final = 16_384
"""Above this a microbatch gains no speed on any device we know, and costs memory."""

MICROBATCHES_PER_STAGE: Final = 2
"""With m microbatches on p stages the bubble is (p - 1) / (m + p - 1): a third at m = 2p."""

STAGES_PER_RANK: Final[Mapping[str, int]] = MappingProxyType(
    {"interleaved-1f1b": 2, "looped-bfs": 2, "zb-v": 2, "dualpipe-v": 2}
)
"""Where nothing is said: V-shaped schedules have two, others at least two."""

WORTH_CUTTING_A_LAYER: Final = 0.97
"""Stages begin between layers unless cutting through one makes the slowest stage at least 3 % faster."""


def complete(
    request: Request,
    graph: ModelGraph,
    *,
    num_ranks: int,
    global_batch: int,
    sequence: int | None,
    precision: Precision = "float32",
    cluster: Cluster | None = None,
) -> Plan:
    """The plan that a request stands for: missing dp fills the ranks, stages are balanced by FLOPs and bytes moved.

    An optimal schedule is one for ``cluster``, where it is given. ``precision`` holds where the request says nothing. Raises ``PlanError``
    if the request fits no such plan.
    """
    mesh = _mesh(request, num_ranks)
    shares = proportional_shares(global_batch, request.shares or (1,) * mesh.dp)
    if len(shares) != mesh.dp:
        raise PlanError(
            f"shares={'/'.join(map(str, request.shares or ()))} are {len(shares)}, and dp is {mesh.dp}",
            hint=f'--plan "dp={len(shares)},shares=..."',
        )
    if min(shares) < 1:
        raise PlanError(
            f"a batch of {global_batch} samples leaves one of {mesh.dp} data-parallel ranks without any",
            hint=f"--batch {max(mesh.dp, sum(request.shares or ()))}",
        )
    per_rank = request.stages_per_rank or STAGES_PER_RANK.get(request.schedule, 1)
    microbatch = request.microbatch or _sized(graph, default_microbatch(shares, mesh.pp, sequence))
    alike, by_stage = _recompute(request, mesh.pp * per_rank)
    plan = Plan(
        mesh=mesh,
        stages=cut_stages(graph, mesh.pp * per_rank, microbatch=microbatch, sequence=sequence),
        global_batch=global_batch,
        sequence=sequence,
        microbatch=microbatch,
        shares=shares,
        zero=request.zero,
        recompute=alike,
        stage_recompute=by_stage,
        recompute_modules=request.recompute_modules,
        ep=request.ep,
        etp=_expert_ranks(request),
        zero_ranks=request.zero_ranks,
        schedule="1f1b" if request.schedule == "optimal" else request.schedule,
        precision=request.precision or precision,
        gradient_dtype=request.gradient_dtype,
        offload=request.offload,
        is_sequence_parallel=request.is_sequence_parallel,
        is_compiled=request.is_compiled,
        replicate=request.replicate,
    )
    return with_optimal_order(plan, graph, cluster) if request.schedule == "optimal" else plan


def proportional_shares(global_batch: int, weights: Sequence[int]) -> tuple[int, ...]:
    """Samples of each data-parallel rank, in proportion to the weights; what is left goes to the largest remainders, first ranks first."""
    total = sum(weights)
    shares = [global_batch * weight // total for weight in weights]
    remainders = [global_batch * weight % total for weight in weights]
    order = sorted(range(len(weights)), key=lambda rank: (-remainders[rank], rank))
    for rank in order[: global_batch - sum(shares)]:
        shares[rank] += 1
    return tuple(shares)


def default_microbatch(shares: Sequence[int], num_stages: int, sequence: int | None) -> int:
    """Samples of a microbatch: as many as pay, but few enough that a pipeline has two microbatches a stage where the batch allows.

    Every rank runs equally many microbatches, none of them empty: the largest share makes at most as many as the smallest has samples.
    """
    largest, smallest = max(shares), min(shares)
    wanted = MICROBATCHES_PER_STAGE * num_stages if num_stages > 1 else 1
    by_stages = max(1, largest // wanted)
    by_tokens = max(1, MAX_MICROBATCH_TOKENS // (sequence or 1))
    return max(min(by_stages, by_tokens), -(-largest // smallest))


def cut_stages(
    graph: ModelGraph, num_stages: int, *, microbatch: int, sequence: int | None
) -> tuple[StageRange, ...]:
    """Stages of nearly equal time, embedding and head counted.

    Stages begin between blocks; where there are too few blocks, or cutting through one pays, between any two ops over which little travels.
    """
    if num_stages == 1:
        return ranges(graph, (0,))
    between_blocks = _cut_at((), graph, num_stages, microbatch, sequence)
    at_good_positions = _cut_at(good_positions(graph), graph, num_stages, microbatch, sequence)
    if between_blocks and at_good_positions:
        pays = at_good_positions.heaviest < WORTH_CUTTING_A_LAYER * between_blocks.heaviest
        return ranges(graph, (at_good_positions if pays else between_blocks).starts)
    anywhere = [p for p, num_bytes in enumerate(all_crossing_bytes(graph)) if num_bytes]
    found = at_good_positions or _cut_at(anywhere, graph, num_stages, microbatch, sequence)
    if found is None:
        raise PlanError(
            f"pp={num_stages}, and the model can be cut into {len(anywhere) + 1} stages at most",
            hint=f'--plan "pp={len(anywhere) + 1}"',
        )
    return ranges(graph, found.starts)


class _Cut(NamedTuple):
    """Op positions where stages start, and the relative time of the slowest of them."""

    starts: tuple[int, ...]
    heaviest: float


def _cut_at(
    boundaries: Sequence[int], graph: ModelGraph, num_stages: int, microbatch: int, sequence: int | None
) -> _Cut | None:
    """The best cut between blocks and at the boundaries; ``None`` where that gives too few units."""
    folded = fold(graph, boundaries=boundaries)
    if len(folded.units) < num_stages:
        return None
    weights = unit_weights(folded, microbatch=microbatch, sequence=sequence)
    starts = balanced(weights, num_stages)
    return _Cut(tuple(folded.units[start].start for start in starts), slowest(weights, starts))


def unit_weights(folded: Folded, *, microbatch: int, sequence: int | None) -> tuple[float, ...]:
    """Relative time of every unit of the whole graph, forward and backward."""
    graph = sized(folded.graph, microbatch, sequence)
    kept = [
        sum(op_time(graph, op, RELATIVE).both_s for op in graph.ops[start:stop])
        for start, stop in folded.kept
    ]
    return tuple(kept[unit.twin] for unit in folded.units)


def sized(graph: ModelGraph, microbatch: int, sequence: int | None) -> ModelGraph:
    """The graph at a plan's sizes, as far as it can be had there."""
    return graph.at(
        microbatch=microbatch if graph.is_scalable else graph.microbatch,
        sequence=sequence if graph.is_sequence_scalable else graph.sequence,
    )


def ranges(graph: ModelGraph, starts: Sequence[int]) -> tuple[StageRange, ...]:
    """Stages that begin at these op positions."""
    stops = (*starts[1:], len(graph.ops))
    return tuple(
        StageRange(first=graph.ops[start].name, last=graph.ops[stop - 1].name)
        for start, stop in zip(starts, stops, strict=True)
    )


def _expert_ranks(request: Request) -> Literal[1] | None:
    """What the plan says of experts: nothing where all tensor-parallel ranks cut each."""
    if request.etp is None or request.etp == request.tp > 1:
        return None
    if request.tp == 1:
        raise PlanError(
            f"etp={request.etp} says how many tensor-parallel ranks cut an expert, and with tp=1 none does",
            hint='leave out etp, or --plan "...,tp=2,etp=1"',
        )
    if request.etp != 1:
        raise PlanError(
            f"etp={request.etp} cannot be: an expert is cut over all {request.tp} tensor-parallel ranks, or whole on each",
            hint=f'--plan "...,tp={request.tp},etp=1", or without etp',
        )
    return 1


def _mesh(request: Request, num_ranks: int) -> Mesh:
    model_ranks = request.tp * request.pp * request.cp
    dp = request.dp if request.dp is not None else num_ranks // model_ranks
    order = ("dp", "pp", "cp", "tp") if request.dp_outside else AXES
    mesh = Mesh(pp=request.pp, dp=dp, tp=request.tp, cp=request.cp, order=order)
    if mesh.world_size == num_ranks and dp >= 1:
        return mesh
    product = f"tp={request.tp} × pp={request.pp}" + (f" × cp={request.cp}" if request.cp > 1 else "")
    cp = f",cp={request.cp}" if request.cp > 1 else ""
    product = product if request.dp is None else f"dp={request.dp} × {product}"
    needed = model_ranks * (request.dp or 1)
    fits = num_ranks % model_ranks == 0 and num_ranks >= model_ranks
    raise PlanError(
        f"{product} needs {'a multiple of ' if request.dp is None else ''}{needed} ranks, and there are {num_ranks}",
        hint=f'--plan "dp={num_ranks // model_ranks},tp={request.tp},pp={request.pp}{cp}"'
        if fits
        else f"--ranks {needed}",
    )


def _recompute(request: Request, num_stages: int) -> tuple[StageRecompute, tuple[StageRecompute, ...]]:
    """What all stages recompute, and what each does where they differ."""
    modes = request.stage_recompute
    if modes and len(modes) != num_stages:
        raise PlanError(
            f"stages= says what {len(modes)} stages recompute, and the plan has {num_stages}",
            hint=f'--plan "...,stages={modes[0]}*{num_stages}"',
        )
    if len(set(modes)) > 1:
        return "none", modes
    return (modes[0] if modes else request.recompute), ()


def _sized(graph: ModelGraph, microbatch: int) -> int:
    return microbatch if graph.is_scalable else graph.microbatch
