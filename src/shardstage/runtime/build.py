"""``build_engine``: from a Program to the engine of one rank, weights created sharded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shardstage.graph import ModelGraph
from shardstage.graph.cuts import Segment
from shardstage.graph.fallback import module_library
from shardstage.graph.recompute import is_selective
from shardstage.graph.source import ModelSource
from shardstage.operators import OperatorContext, RandomState, library
from shardstage.plan.plan import Plan
from shardstage.program import Program, StageGraphs, lower, verify
from shardstage.program.stage_parameters import HeldParameter, assign_buckets, held_parameters
from shardstage.runtime.block_code import BlockWriter
from shardstage.runtime.bucketed import BucketedParameters
from shardstage.runtime.dry_run_kernels import cuda_kernels
from shardstage.runtime.engine import Engine, Parameters
from shardstage.runtime.fully_sharded import FullyShardedParameters
from shardstage.runtime.groups import RankGroups, build_groups
from shardstage.runtime.leaves import ParameterInfo
from shardstage.runtime.optimizer import Optimizer, OptimizerConfig
from shardstage.runtime.process_group import allocate_shared
from shardstage.runtime.stage import Stage, build_stage
from shardstage.runtime.storage import Storage
from shardstage.runtime.weights import initial_buffers, initial_weights

__all__ = ["assemble_engine", "build_engine", "tied_ranks"]


def build_engine(
    graph: ModelGraph,
    plan: Plan,
    source: ModelSource,
    *,
    rank: int,
    seed: int,
    optimizer: OptimizerConfig,
    device: torch.device,
    weights_folder: str | None = None,
) -> Engine:
    """The engine of ``rank``; collective: every rank of the world calls it with the same arguments but ``rank``.

    Parameters are drawn from ``seed``, or streamed from ``weights_folder``, straight into this rank's shard.
    """
    graphs = StageGraphs(graph, plan)
    program = lower(graph, plan, graphs)
    verify(program)
    groups = build_groups(plan.mesh, rank, tied_ranks(program))
    engine = assemble_engine(
        program,
        graphs,
        source,
        groups,
        seed=seed,
        optimizer=optimizer,
        device=device,
        allocate=_allocator(groups, device),
    )
    _load(
        engine.stages.values(),
        engine.parameters,
        source,
        groups,
        seed=seed,
        dtype=Storage.of(plan, device).master_dtype,
        device=device,
        folder=weights_folder,
    )
    return engine


def assemble_engine(
    program: Program,
    graphs: StageGraphs,
    source: ModelSource,
    groups: RankGroups,
    *,
    seed: int,
    optimizer: OptimizerConfig,
    device: torch.device,
    allocate: Callable[[int, torch.dtype], Tensor],
    read: Callable[[Tensor], list[float]] = Tensor.tolist,
    device_kind: str | None = None,
    compute_capability: float | None = None,
) -> Engine:
    """The engine of the rank whose ``groups`` these are, with parameters that have no values yet and buffers still on meta.

    ``allocate`` makes the flat buffers in which parameters and gradients lie. ``device_kind`` is what operators are to be quick on, and
    to keep tensors as, where that is not the device; ``compute_capability`` is CUDA's (None: 8.0 or more).
    """
    graph, plan, rank = graphs.graph, graphs.plan, groups.rank
    mesh = plan.mesh
    dp, tp = mesh.coordinate(rank, "dp"), mesh.coordinate(rank, "tp")
    sizes = dict.fromkeys(plan.microbatches(dp))
    own = program.stages_of(mesh.coordinate(rank, "pp"))
    cuts = {size: graphs.segments(tp=tp, microbatch=size) for size in sizes}
    segments = {stage: {size: cuts[size][stage] for size in sizes} for stage in own}
    held = _held_parameters(program, graphs, next(iter(cuts.values())), own)
    device_kind = device_kind or device.type
    context = _context(groups, plan, own, seed=seed, device_kind=device_kind, capability=compute_capability)
    is_fully_sharded = plan.zero >= 2 and mesh.dp > 1
    storage = Storage.of(plan, device)
    writer = BlockWriter(_library(graph, source, context, device), device, is_compiled=plan.is_compiled)
    stages = {
        stage: build_stage(
            segments[stage],
            {p.name: _info(p, graphs) for p in held[stage]},
            context=context,
            writer=writer,
            recompute=plan.recompute_of(stage),
            modules=plan.recompute_modules,
            parameter_dtype=storage.gradient_dtype if is_fully_sharded else None,
        )
        for stage in own
    }
    buckets = None if is_fully_sharded else _buckets(program, plan, rank, held)
    parameters = _parameters(plan, list(stages.values()), buckets, groups, storage, allocate, context)
    return Engine(
        program=program,
        graphs=graphs,
        groups=groups,
        stages=stages,
        segments=segments,
        parameters=parameters,
        optimizer=Optimizer(optimizer, parameters.leaves),
        context=context,
        device=device,
        read=read,
    )


def tied_ranks(program: Program) -> set[tuple[int, ...]]:
    """The sets of pipeline ranks that hold one and the same parameter."""
    holders = {
        tuple(sorted({program.stage_ranks[s] for s in parameter.stages})) for parameter in program.parameters
    }
    return {ranks for ranks in holders if len(ranks) > 1}


def _context(
    groups: RankGroups,
    plan: Plan,
    own: Iterable[int],
    *,
    seed: int,
    device_kind: str,
    capability: float | None,
) -> OperatorContext:
    return OperatorContext(
        tp_group=groups.tp_group,
        tp_rank=groups.tp,
        tp_size=plan.mesh.tp,
        random=RandomState(seed=seed),
        may_overwrite=not any(is_selective(plan.recompute_of(stage)) for stage in own),
        device_kind=device_kind,
        compute_capability=capability,
    )


def _parameters(
    plan: Plan,
    stages: Sequence[Stage],
    buckets: list[list[str]] | None,
    groups: RankGroups,
    storage: Storage,
    allocate: Callable[[int, torch.dtype], Tensor],
    context: OperatorContext,
) -> Parameters:
    """In flat buffers, into which operators add gradients themselves; without buckets FSDP2's."""
    if buckets is None:
        return FullyShardedParameters(stages, groups, zero=plan.zero, storage=storage)
    bucketed = BucketedParameters(stages, buckets, groups, zero=plan.zero, storage=storage, allocate=allocate)
    context.weights.accumulate = bucketed.accumulate
    return bucketed


def _buckets(
    program: Program, plan: Plan, rank: int, held: Mapping[int, Sequence[HeldParameter]]
) -> list[list[str]]:
    """Names of parameters by bucket, in the order in which the last backwards of the rank's stages fill them."""
    last = {i.stage: at for at, i in enumerate(program.row_of(rank).instructions) if i.is_computation}
    order = sorted(held, key=lambda stage: last[stage])
    return [[p.name for p in bucket] for bucket in assign_buckets([held[stage] for stage in order], plan)]


def _held_parameters(
    program: Program, graphs: StageGraphs, segments: Sequence[Segment], own: Iterable[int]
) -> dict[int, tuple[HeldParameter, ...]]:
    """By stage, of the rank's own."""
    placements = graphs.sharding_at(graphs.plan.microbatches(0)[0]).parameters
    users = {parameter.fqn: parameter.stages for parameter in program.parameters}
    return {s: held_parameters(segments[s], placements, users, program.stage_ranks) for s in own}


def _library(
    graph: ModelGraph, source: ModelSource, context: OperatorContext, device: torch.device
) -> Mapping[str, Callable[..., Any]]:
    """Our operators, and the model's own modules where it could not be exported and runs as blocks.

    In a dry run on the CPU of what is to run on CUDA also those that keep there what torch's keep only there.
    """
    operators = library(context)
    if context.device_kind == "cuda" and device.type != "cuda":
        operators = {**operators, **cuda_kernels(context.compute_capability)}
    known = {op.target for op in graph.ops if op.target.startswith("shardstage.")} <= set(operators)
    return operators if known else {**operators, **module_library(source)}


def _info(parameter: HeldParameter, graphs: StageGraphs) -> ParameterInfo:
    whole = graphs.sharding_at(graphs.plan.microbatches(0)[0]).graph
    return ParameterInfo(
        name=parameter.name,
        fqn=parameter.fqn,
        shape=whole.values[parameter.name].shape,
        local_shape=parameter.shape,
        placement=parameter.placement,
        ties=parameter.ties,
        block=parameter.block,
    )


def _allocator(groups: RankGroups, device: torch.device) -> Callable[[int, torch.dtype], Tensor]:
    """Flat buffers lie in memory that the dp ranks of a host share, where they can: their reduction then copies nothing."""

    def allocate(numel: int, dtype: torch.dtype) -> Tensor:
        if device.type == "cpu" and groups.dp_group is not None:
            return allocate_shared(numel, dtype, groups.dp_group)
        return torch.empty(numel, dtype=dtype, device=device)

    return allocate


def _load(
    stages: Iterable[Stage],
    parameters: Parameters,
    source: ModelSource,
    groups: RankGroups,
    *,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    folder: str | None,
) -> None:
    """Fills parameters and buffers, one tensor at a time."""
    stages = list(stages)
    by_fqn = {info.fqn: info for stage in stages for info in stage.infos.values()}
    wanted = {fqn: info.placement for fqn, info in by_fqn.items()}
    with torch.no_grad():
        for fqn, local in initial_weights(
            source, wanted, tp_rank=groups.tp, seed=seed, dtype=dtype, folder=folder
        ):
            parameters.assign(by_fqn[fqn].name, local.to(device))
        buffers = [(fqn, stage, name) for stage in stages for name, fqn in stage.buffer_fqns.items()]
        for (_, stage, name), (_, tensor) in zip(
            buffers, initial_buffers(source, [fqn for fqn, _, _ in buffers]), strict=True
        ):
            stage.set_buffer(name, tensor.to(device))
