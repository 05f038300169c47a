"""``lower``: from a plan to the instructions of every rank."""

from __future__ import annotations

from functools import cache

from shardstage.errors import PlanError
from shardstage.graph import ModelGraph
from shardstage.graph.cuts import Edge, cut
from shardstage.plan.plan import Plan
from shardstage.program.instruction import Instruction
from shardstage.program.program import Program, stage_starts
from shardstage.schedule import SCHEDULES, Action
from shardstage.sharding import Sharding, localize, shard

__all__ = ["lower"]


def lower(graph: ModelGraph, plan: Plan) -> Program:
    """The Program that runs ``graph`` as ``plan`` says.

    ``graph`` is scalable (captured at marker sizes) or was captured at the plan's microbatch and sequence. Raises ``PlanError`` for a
    stage that begins at an op the graph does not have.
    """

    @cache
    def sharding_at(microbatch: int) -> Sharding:
        return shard(
            _sized(graph, microbatch, plan.sequence),
            num_ranks=plan.mesh.tp,
            is_sequence_parallel=plan.is_sequence_parallel,
            replicate=plan.replicate,
        )

    _require_ops(graph, plan)
    local = localize(sharding_at(plan.microbatches(0)[0]), 0)
    edges = tuple(edge for segment in cut(local, stage_starts(local, plan.stages)) for edge in segment.sends)
    return Program(plan=plan, instructions=_instructions(plan, edges), edges=edges, sharding_at=sharding_at)


def _sized(graph: ModelGraph, microbatch: int, sequence: int | None) -> ModelGraph:
    if (graph.microbatch, graph.sequence) == (microbatch, sequence):
        return graph
    if not graph.is_scalable:
        raise PlanError(
            f"the graph holds for microbatches of {graph.microbatch} samples only, and the plan asks for {microbatch}",
            hint=f'--plan "...,mb={graph.microbatch}"',
        )
    return graph.at(microbatch=microbatch, sequence=sequence)


def _require_ops(graph: ModelGraph, plan: Plan) -> None:
    names = {op.name for op in graph.ops}
    for number, stage in enumerate(plan.stages):
        if stage.first not in names:
            raise PlanError(
                f"stage {number} begins at op {stage.first!r}, which the model does not have",
                hint=f'--plan "pp={len(plan.stages)}" cuts this model anew',
            )


def _instructions(plan: Plan, edges: tuple[Edge, ...]) -> tuple[tuple[Instruction, ...], ...]:
    schedule = SCHEDULES[plan.schedule](plan.mesh.pp, plan.num_microbatches)
    return tuple(
        (
            *(instruction for action in row for instruction in _with_transfers(action, edges)),
            Instruction(stage, "REDUCE_GRAD"),
            Instruction(stage, "STEP"),
        )
        for stage, row in enumerate(schedule.actions)
    )


def _with_transfers(action: Action, edges: tuple[Edge, ...]) -> tuple[Instruction, ...]:
    """The action between what must arrive for it and what it sends on.

    Forwards receive from earlier stages and send to later ones; backwards the other way round, and only over edges that a
    gradient flows along: those whose value requires one.
    """
    stage, microbatch = action.stage, action.microbatch
    if action.kind == "F":
        sources = sorted({e.source for e in edges if e.target == stage})
        targets = sorted({e.target for e in edges if e.source == stage})
    else:
        sources = sorted({e.target for e in edges if e.source == stage and e.requires_grad})
        targets = sorted({e.source for e in edges if e.target == stage and e.requires_grad})
    return (
        *(
            Instruction(stage, "RECV_F" if action.kind == "F" else "RECV_B", microbatch, peer)
            for peer in sources
        ),
        Instruction(stage, action.kind, microbatch),
        *(
            Instruction(stage, "SEND_F" if action.kind == "F" else "SEND_B", microbatch, peer)
            for peer in targets
        ),
    )
