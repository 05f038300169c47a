"""``build_engine``: from a Program to the engine of one rank, weights created sharded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from shardstage.graph import ModelGraph
from shardstage.graph.cuts import Segment, shared_parameters
from shardstage.graph.fallback import module_library
from shardstage.graph.source import ModelSource
from shardstage.operators import OperatorContext, RandomState, library
from shardstage.plan.plan import Plan
from shardstage.program import Program, lower, verify
from shardstage.runtime.block_code import BlockWriter
from shardstage.runtime.bucketed import BucketedParameters
from shardstage.runtime.engine import Engine, Parameters
from shardstage.runtime.fully_sharded import FullyShardedParameters
from shardstage.runtime.groups import RankGroups, build_groups
from shardstage.runtime.leaves import ParameterInfo
from shardstage.runtime.optimizer import Optimizer, OptimizerConfig
from shardstage.runtime.process_group import allocate_shared
from shardstage.runtime.stage import Stage, build_stage
from shardstage.runtime.weights import initial_buffers, initial_weights

__all__ = ["build_engine"]


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
    program = lower(graph, plan)
    verify(program)
    mesh = plan.mesh
    coordinates = {
        "pp": mesh.coordinate(rank, "pp"),
        "dp": mesh.coordinate(rank, "dp"),
        "tp": mesh.coordinate(rank, "tp"),
    }
    by_size = {
        size: program.segments(tp=coordinates["tp"], microbatch=size)
        for size in dict.fromkeys(plan.microbatches(coordinates["dp"]))
    }
    ties = {
        fqn: stages
        for fqn, stages in shared_parameters(next(iter(by_size.values()))).items()
        if len(stages) > 1
    }
    groups = build_groups(mesh, rank, ties.values())
    segments = {size: parts[groups.pp] for size, parts in by_size.items()}
    random = RandomState(seed=seed)
    context = OperatorContext(
        tp_group=groups.tp_group,
        tp_rank=groups.tp,
        tp_size=mesh.tp,
        random=random,
        may_overwrite=plan.recompute != "selective",
    )
    infos = _parameter_infos(program, next(iter(segments.values())), ties)
    precision: torch.dtype = getattr(torch, plan.precision)
    master_dtype = torch.float64 if precision == torch.float64 else torch.float32
    is_fully_sharded = plan.zero >= 2 and mesh.dp > 1
    stage = build_stage(
        segments,
        infos,
        context=context,
        writer=BlockWriter(_library(graph, source, context), device, is_compiled=plan.is_compiled),
        recompute=plan.recompute,
        parameter_dtype=master_dtype if is_fully_sharded else None,
    )
    parameters = (
        FullyShardedParameters(
            stage, groups, zero=plan.zero, compute_dtype=precision, master_dtype=master_dtype, device=device
        )
        if is_fully_sharded
        else BucketedParameters(
            stage,
            groups,
            zero=plan.zero,
            bucket_bytes=plan.bucket_bytes,
            device=device,
            master_dtype=master_dtype,
            allocate=_allocator(groups, device),
        )
    )
    _load(
        stage, parameters, source, groups, seed=seed, dtype=master_dtype, device=device, folder=weights_folder
    )
    return Engine(
        program=program,
        groups=groups,
        stage=stage,
        segments=segments,
        parameters=parameters,
        optimizer=Optimizer(optimizer, parameters.leaves),
        random=random,
        device=device,
    )


def _library(
    graph: ModelGraph, source: ModelSource, context: OperatorContext
) -> Mapping[str, Callable[..., Any]]:
    """Our operators, and the model's own modules where it could not be exported and runs as blocks."""
    operators = library(context)
    known = {op.target for op in graph.ops if op.target.startswith("shardstage.")} <= set(operators)
    return operators if known else {**operators, **module_library(source)}


def _parameter_infos(
    program: Program, segment: Segment, ties: Mapping[str, tuple[int, ...]]
) -> dict[str, ParameterInfo]:
    sharding = program.sharding_at(program.plan.microbatches(0)[0])
    return {
        parameter.name: ParameterInfo(
            name=parameter.name,
            fqn=parameter.fqn,
            shape=sharding.graph.values[parameter.name].shape,
            local_shape=segment.graph.values[parameter.name].shape,
            placement=sharding.parameters[parameter.fqn],
            stages=ties.get(parameter.fqn, (segment.index,)),
        )
        for parameter in segment.graph.parameters
    }


def _allocator(groups: RankGroups, device: torch.device) -> Callable[[int, torch.dtype], Tensor]:
    """Flat buffers lie in memory that the dp ranks of a host share, where they can: their reduction then copies nothing."""

    def allocate(numel: int, dtype: torch.dtype) -> Tensor:
        if device.type == "cpu" and groups.dp_group is not None:
            return allocate_shared(numel, dtype, groups.dp_group)
        return torch.empty(numel, dtype=dtype, device=device)

    return allocate


def _load(
    stage: Stage,
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
    by_fqn = {info.fqn: info for info in stage.infos.values()}
    wanted = {fqn: info.placement for fqn, info in by_fqn.items()}
    with torch.no_grad():
        for fqn, local in initial_weights(
            source, wanted, tp_rank=groups.tp, seed=seed, dtype=dtype, folder=folder
        ):
            parameters.assign(by_fqn[fqn].name, local.to(device))
        names = {stage.buffer_fqns[name]: name for name in stage.buffer_fqns}
        for fqn, tensor in initial_buffers(source, tuple(names)):
            stage.set_buffer(names[fqn], tensor.to(device))
