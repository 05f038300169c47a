"""``lower``: from a plan to the instructions of every rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from typing import Any

from shardstage.errors import PlanError
from shardstage.graph import ModelGraph
from shardstage.graph.cuts import Edge, shared_parameters
from shardstage.plan.check import require_runnable
from shardstage.plan.plan import Plan
from shardstage.plan.schedule import schedule_of
from shardstage.program.collectives import StageCalls, stage_calls
from shardstage.program.instruction import Instruction
from shardstage.program.program import Collective, ParameterUse, Program, Row, TensorType
from shardstage.program.receive_order import in_order_of_sending
from shardstage.program.stage_graphs import StageGraphs
from shardstage.program.stage_parameters import (
    HeldParameter,
    Unit,
    assign_buckets,
    gradient_dtype,
    held_parameters,
    row_range,
    tie_axis,
    unit_numel,
    units_of,
)
from shardstage.schedule import Action

__all__ = ["lower"]


def lower(graph: ModelGraph, plan: Plan, stages: StageGraphs | None = None) -> Program:
    """The Program that runs ``graph`` as ``plan`` says.

    ``stages`` are the plan's stage graphs where the caller has them. Raises ``PlanError`` for a stage that begins at an op the graph does
    not have, ``PlanError`` for a schedule that cannot be.
    """
    require_runnable(plan)
    return _Lowering(stages or StageGraphs(graph, plan)).program()


class _Table:
    """Names for contents, the same for the same."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._names: dict[Any, str] = {}

    def name(self, content: Any) -> str:
        """The content's name, none for nothing."""
        return self._names.setdefault(content, f"{self._prefix}{len(self._names)}") if content else ""

    def contents(self) -> Mapping[str, Any]:
        return {name: content for content, name in self._names.items()}


class _Lowering:
    def __init__(self, stages: StageGraphs) -> None:
        self.stages = stages
        self.plan = plan = stages.plan
        self.messages, self.calls, self.buckets = _Table("m"), _Table("c"), _Table("b")
        self.schedule = schedule_of(plan)
        self._first_size = plan.microbatches(0)[0]
        self._segments = stages.segments(tp=0, microbatch=self._first_size)
        self.edges = tuple(edge for segment in self._segments for edge in segment.sends)
        self._stage_calls: dict[tuple[int, int, int], StageCalls] = {}
        self._held: dict[tuple[int, int], tuple[HeldParameter, ...]] = {}

    def program(self) -> Program:
        mesh = self.plan.mesh
        self._require_apart()
        rows = tuple(row for pp in range(mesh.pp) for row in self._rows(pp))
        rows = tuple(self._in_order_of_sending(row, rows) for row in rows)
        return Program(
            mesh=mesh,
            schedule=self.plan.schedule,
            global_batch=self.plan.global_batch,
            samples=tuple(self.plan.microbatches(dp) for dp in range(mesh.dp)),
            stage_ranks=self.schedule.stage_ranks,
            edges=self.edges,
            messages=self.messages.contents(),
            calls=self.calls.contents(),
            buckets=self.buckets.contents(),
            parameters=tuple(self._parameters()),
            rows=rows,
        )

    def _in_order_of_sending(self, row: Row, rows: Sequence[Row]) -> Row:
        """Every row of a pipeline rank sends in the same order."""
        peers = {other.pp: other.instructions for other in reversed(rows)}
        instructions = in_order_of_sending(
            row.instructions, [peers[pp] for pp in range(self.plan.mesh.pp)], self.schedule.stage_ranks
        )
        return replace(row, instructions=instructions)

    def _require_apart(self) -> None:
        """ZeRO-2/3 shards the parameters of each stage on its own: two stages of one rank cannot share one."""
        if not self._is_fully_sharded:
            return
        for fqn, stages in self._users.items():
            ranks = [self.schedule.stage_ranks[stage] for stage in stages]
            if len(set(ranks)) < len(ranks):
                raise PlanError(
                    f"zero={self.plan.zero} shards each stage's parameters apart, and stages {' and '.join(map(str, stages))}, "
                    f"which share {fqn}, are on one rank under {self.plan.schedule}",
                    hint=f'--plan "...,zero=1,schedule={self.plan.schedule}", or schedule=1f1b',
                )

    def _rows(self, pp: int) -> Iterator[Row]:
        """The rows of a pipeline rank; dp and tp coordinates with equal instructions share one."""
        mesh = self.plan.mesh
        bodies: dict[tuple[tuple[int, ...], int], tuple[Instruction, ...]] = {}
        found: dict[tuple[Instruction, ...], list[tuple[int, int]]] = {}
        for tp in range(mesh.tp):
            twin = self.stages.twin(tp)
            for dp in range(mesh.dp):
                key = (self.plan.microbatches(dp), twin)
                if key not in bodies:
                    bodies[key] = tuple(self._body(pp, *key))
                row = (*bodies[key], *self._ending(pp, dp, twin))
                found.setdefault(row, []).append((dp, tp))
        for instructions, coordinates in found.items():
            by_dp = groupby(sorted(coordinates), key=lambda at: at[0])
            tps_of = {dp: tuple(tp for _, tp in group) for dp, group in by_dp}
            for tps in dict.fromkeys(tps_of.values()):
                dps = tuple(dp for dp, found_tps in tps_of.items() if found_tps == tps)
                yield Row(pp=pp, dp=dps, tp=tps, instructions=instructions)

    def _body(self, pp: int, sizes: Sequence[int], tp: int) -> Iterator[Instruction]:
        """Everything up to the last backward."""
        count = (Collective("dp", "all_reduce", "int64", 1),) if self.plan.mesh.dp > 1 else ()
        yield Instruction(None, "COUNT", calls=self.calls.name(count))
        unsharded = {stage: self._unsharded(stage, tp) for stage in self.schedule.stages_of(pp)}
        for stage, gathers in unsharded.items():
            if gathers:
                yield Instruction(stage, "UNSHARD", calls=self.calls.name(gathers))
        for action in self.schedule.actions[pp]:
            yield from self._act(action, sizes[action.microbatch], tp)
        for stage, gathers in unsharded.items():
            if gathers:
                yield Instruction(stage, "RESHARD")

    def _act(self, action: Action, size: int, tp: int) -> Iterator[Instruction]:
        """The action between what must arrive for it and what it sends on.

        Forwards receive from earlier stages and send to later ones; backwards the other way round, and only over edges that a
        gradient flows along. Between stages of one rank nothing is sent.
        """
        stage, microbatch = action.stage, action.microbatch
        calls = self._calls(stage, size, tp)
        incoming = [e for e in self.edges if e.target == stage]
        outgoing = [e for e in self.edges if e.source == stage]
        match action.kind:
            case "F":
                yield from self._transfers("RECV_F", action, incoming, size, tp)
                yield Instruction(stage, "F", microbatch, calls=self.calls.name(calls.forward))
                yield from self._transfers("SEND_F", action, outgoing, size, tp)
            case "B" | "I":
                yield from self._transfers("RECV_B", action, outgoing, size, tp)
                yield Instruction(stage, action.kind, microbatch, calls=self.calls.name(calls.backward))
                yield from self._transfers("SEND_B", action, incoming, size, tp)
            case "W":
                yield Instruction(stage, "W", microbatch)

    def _transfers(
        self, kind: Any, action: Action, edges: Sequence[Edge], size: int, tp: int
    ) -> Iterator[Instruction]:
        """One message with each peer on another rank, in the order in which stages run forwards or backwards."""
        ranks, stage = self.schedule.stage_ranks, action.stage
        graphs = self.stages.segments(tp=tp, microbatch=size)
        by_peer: dict[int, list[TensorType]] = {}
        for edge in edges:
            peer = edge.source if edge.target == stage else edge.target
            if ranks[peer] == ranks[stage] or not (kind.endswith("F") or edge.requires_grad):
                continue
            value = graphs[edge.source].graph.values[edge.value]
            by_peer.setdefault(peer, []).append(TensorType(edge.value, value.dtype, value.shape))
        for peer in sorted(by_peer, reverse=kind.endswith("B")):
            message = self.messages.name(tuple(by_peer[peer]))
            yield Instruction(stage, kind, action.microbatch, peer, message)

    def _ending(self, pp: int, dp: int, tp: int) -> tuple[Instruction, Instruction]:
        reductions, updates = self._reductions(pp, dp, tp)
        return (
            Instruction(None, "REDUCE_GRAD", calls=self.calls.name(reductions)),
            Instruction(None, "STEP", calls=self.calls.name(updates)),
        )

    def _reductions(self, pp: int, dp: int, tp: int) -> tuple[tuple[Collective, ...], tuple[Collective, ...]]:
        """What REDUCE_GRAD and STEP run: over dp first, then over tp and ties what is partial there; the norm, then new parameters."""
        plan, mesh, dtype = self.plan, self.plan.mesh, gradient_dtype(self.plan)
        norm = (Collective("world", "all_reduce", "float64", 2),) if mesh.world_size > 1 else ()
        if self._is_fully_sharded:
            held = [p for stage in self.schedule.stages_of(pp) for p in self._parameters_of(stage, tp)]
            return tuple(self._model_reductions(held, dp, dtype)), norm
        over_dp, over_model, gathers = [], [], []
        shards = mesh.dp if plan.zero else 1
        for bucket in assign_buckets(self._by_last_backward(pp, tp), plan):
            name = self.buckets.name(tuple(p.fqn for p in bucket))
            numel = -(-sum(p.numel for p in bucket) // shards) * shards
            if mesh.dp > 1:
                kind: Any = "reduce_scatter" if plan.zero else "all_reduce"
                over_dp.append(Collective("dp", kind, dtype, numel, name))
            part = numel // shards
            if bucket[0].is_tp_partial:
                over_model.append(Collective("tp", "all_reduce", dtype, part, name))
            if bucket[0].ties:
                over_model.append(Collective(tie_axis(bucket[0].ties), "all_reduce", dtype, part, name))
            if mesh.dp > 1 and plan.zero:
                gathers.append(Collective("dp", "all_gather", bucket[0].dtype, numel, name))
        return (*over_dp, *over_model), (*norm, *gathers)

    def _model_reductions(self, held: Sequence[HeldParameter], dp: int, dtype: str) -> Iterator[Collective]:
        """Under ZeRO-2/3, of this dp rank's rows: all that is partial over tp at once, then all that is tied with the same ranks."""
        mesh = self.plan.mesh
        trained = {p.fqn: p for p in held if p.is_trained}.values()
        partial = [p for p in trained if p.is_tp_partial and mesh.tp > 1]
        tied = [
            [p for p in trained if p.ties == ties] for ties in sorted({p.ties for p in trained if p.ties})
        ]
        for axis, group in [("tp", partial), *((tie_axis(group[0].ties), group) for group in tied)]:
            rows = [row_range(p.shape, mesh, dp) for p in group]
            numel = sum(
                (stop - start) * (p.numel // max(1, p.shape[0] if p.shape else 1))
                for p, (start, stop) in zip(group, rows, strict=True)
            )
            if group and numel:
                name = self.buckets.name(tuple(p.fqn for p in group))
                yield Collective(axis, "all_reduce", dtype, numel, name)

    def _calls(self, stage: int, size: int, tp: int) -> StageCalls:
        key = (stage, size, tp)
        if key not in self._stage_calls:
            segment = self.stages.segments(tp=tp, microbatch=size)[stage]
            units = self._units(stage, tp) if self._is_fully_sharded else ()
            self._stage_calls[key] = stage_calls(segment, self.plan, units)
        return self._stage_calls[key]

    def _unsharded(self, stage: int, tp: int) -> tuple[Collective, ...]:
        """What UNSHARD gathers for the whole step: all blocks under ZeRO-2, under ZeRO-3 what several blocks use."""
        if not self._is_fully_sharded:
            return ()
        units = self._units(stage, tp)
        return tuple(unit.gather() for unit in units if self.plan.zero == 2 or unit.block is None)

    def _units(self, stage: int, tp: int) -> tuple[Unit, ...]:
        plan = self.plan
        return tuple(
            Unit(
                block=block,
                bucket=self.buckets.name(tuple(p.fqn for p in held)),
                numel=unit_numel(held, plan.mesh),
                compute_dtype=plan.precision,
                gradient_dtype=gradient_dtype(plan),
                is_trained=any(p.is_trained for p in held),
            )
            for block, held in units_of(self._parameters_of(stage, tp), plan)
        )

    def _by_last_backward(self, pp: int, tp: int) -> list[tuple[HeldParameter, ...]]:
        last = {action.stage: at for at, action in enumerate(self.schedule.actions[pp])}
        return [self._parameters_of(stage, tp) for stage in sorted(last, key=last.__getitem__)]

    def _parameters_of(self, stage: int, tp: int) -> tuple[HeldParameter, ...]:
        if (stage, tp) not in self._held:
            segment = self.stages.segments(tp=tp, microbatch=self._first_size)[stage]
            placements = self.stages.sharding_at(self._first_size).parameters
            self._held[stage, tp] = held_parameters(
                segment, placements, self._users, self.schedule.stage_ranks
            )
        return self._held[stage, tp]

    def _parameters(self) -> Iterator[ParameterUse]:
        mesh = self.plan.mesh
        found: dict[str, HeldParameter] = {}
        for stage in range(len(self.plan.stages)):
            for parameter in self._parameters_of(stage, 0):
                found.setdefault(parameter.fqn, parameter)
        for fqn, p in found.items():
            axes = ("dp",) * (mesh.dp > 1) + ("tp",) * (p.is_tp_partial and mesh.tp > 1)
            axes += (tie_axis(p.ties),) if p.ties else ()
            yield ParameterUse(
                fqn=fqn, stages=p.stages, summed_over=axes if p.is_trained else (), is_trained=p.is_trained
            )

    @cached_property
    def _users(self) -> dict[str, tuple[int, ...]]:
        """Stages that use each parameter, by fqn."""
        shared = shared_parameters(self._segments)
        return {p.fqn: shared.get(p.fqn, (s.index,)) for s in self._segments for p in s.graph.parameters}

    @property
    def _is_fully_sharded(self) -> bool:
        return self.plan.zero >= 2 and self.plan.mesh.dp > 1
