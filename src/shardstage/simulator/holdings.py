"""``Holdings``: bytes that a rank holds for its parameters all the time, and for one microbatch of one of its stages.

The rules are those of ``cost.memory``, taken apart by when things come and go.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from shardstage.cost.memory import GATHERED_UNITS, MOMENTS
from shardstage.graph.cuts import shared_parameters
from shardstage.layout import Mesh
from shardstage.plan import Plan
from shardstage.plan.schedule import schedule_of
from shardstage.program.stage_parameters import (
    HeldParameter,
    gradient_dtype,
    held_parameters,
    master_dtype,
    needs_bucket,
    units_of,
)
from shardstage.schedule import Schedule
from shardstage.simulator.stage_costs import StageCost, StageCosts
from shardstage.units import dtype_bytes

RUN_BYTES: Final = 64 * 2**20
"""The optimizer widens narrow gradients so many bytes at a time (``runtime.optimizer``)."""

__all__ = ["Holdings", "PlannedHoldings", "RankHolding", "StageHolding", "planned_holdings"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RankHolding:
    """What a rank holds all the time, by category, and what comes and goes: all of a stage's parameters from its UNSHARD to its
    RESHARD, ``step_bytes`` in STEP. ``made_gradients`` of a stage concern no other rank and have no buffer: the first backward makes them.
    ``owned_elements`` are those that its optimizer updates."""

    parameters: int
    master: int
    gradients: int
    optimizer: int
    unsharded: Mapping[int, int] = field(default_factory=dict)
    made_gradients: Mapping[int, int] = field(default_factory=dict)
    step_bytes: int = 0
    owned_elements: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class StageHolding:
    """One microbatch of a stage: ``saved`` by value from F on, ``deferred_bytes`` of it from I to W instead, the others only while
    F or the backward runs; ``gathered_bytes`` and ``unit_gradient_bytes`` are of the blocks that ZeRO-2/3 gathers and reduces."""

    saved: tuple[tuple[str, int], ...]
    deferred_bytes: int
    transient_bytes: int
    recompute_bytes: int
    gathered_bytes: int = 0
    unit_gradient_bytes: int = 0

    @property
    def saved_bytes(self) -> int:
        return sum(num_bytes for _, num_bytes in self.saved)


class Holdings(Protocol):
    """Bytes of a Program's ranks and stages."""

    def rank(self, rank: int) -> RankHolding: ...
    def stage(self, rank: int, stage: int, size: int) -> StageHolding: ...


class PlannedHoldings:
    """Holdings of a plan, from its stage graphs."""

    def __init__(self, costs: StageCosts) -> None:
        self._costs = costs
        self._schedule: Schedule = schedule_of(costs.plan)
        self._ranks: dict[tuple[int, int], RankHolding] = {}
        self._held: dict[tuple[int, int], tuple[HeldParameter, ...]] = {}
        self._stages: dict[tuple[int, int, int], StageHolding] = {}
        plan = costs.plan
        self._first_size = plan.microbatches(0)[0]
        self._level = plan.zero if plan.mesh.dp > 1 else 0
        self._compute_bytes = dtype_bytes(plan.precision)
        self._master_bytes = dtype_bytes(master_dtype(plan))
        self._gradient_bytes = dtype_bytes(gradient_dtype(plan))
        self._is_offloaded = plan.offload == "optimizer"
        segments = costs.stages.segments(tp=0, microbatch=self._first_size)
        shared = shared_parameters(segments)
        self._users = {p.fqn: shared.get(p.fqn, (s.index,)) for s in segments for p in s.graph.parameters}

    def rank(self, rank: int) -> RankHolding:
        mesh = self._mesh
        key = (mesh.coordinate(rank, "pp"), self._twin(rank))
        if key not in self._ranks:
            self._ranks[key] = self._rank(*key)
        return self._ranks[key]

    def stage(self, rank: int, stage: int, size: int) -> StageHolding:
        twin = self._twin(rank)
        key = (stage, twin, size)
        if key not in self._stages:
            self._stages[key] = self._stage(stage, twin, self._costs.cost(stage, tp=twin, size=size))
        return self._stages[key]

    @property
    def _plan(self) -> Plan:
        return self._costs.plan

    @property
    def _mesh(self) -> Mesh:
        return self._plan.mesh

    def _twin(self, rank: int) -> int:
        return self._costs.stages.twin(self._mesh.coordinate(rank, "tp"))

    def _rank(self, pp: int, tp: int) -> RankHolding:
        plan, level = self._plan, self._level
        c, g, w = self._compute_bytes, self._gradient_bytes, self._master_bytes
        held = {p.fqn: p for stage in self._schedule.stages_of(pp) for p in self._parameters(stage, tp)}
        elements = sum(p.numel for p in held.values())
        trained = sum(p.numel for p in held.values() if p.is_trained)
        part = -(-trained // (plan.mesh.dp if level else 1))
        made = self._made_gradients(pp, tp) if level < 2 else {}
        is_apart = self._is_offloaded or (g if level >= 2 else c) != w
        stays = not self._is_offloaded
        staged = min(part * w, RUN_BYTES) if stays and g != w else 0
        return RankHolding(
            parameters=elements * c if level < 2 else (part * g if is_apart else 0),
            master=part * w if stays and (level >= 2 or is_apart) else 0,
            gradients=(part * g if level else 0) + (trained * g - sum(made.values()) if level < 2 else 0),
            optimizer=MOMENTS * part * w if stays else 0,
            unsharded={s: self._unsharded(s, tp) * c for s in self._schedule.stages_of(pp)}
            if level >= 2
            else {},
            made_gradients=made,
            step_bytes=max(staged, min(plan.bucket_bytes, elements * c) // plan.mesh.dp if level == 1 else 0),
            owned_elements=part,
        )

    def _made_gradients(self, pp: int, tp: int) -> dict[int, int]:
        """Bytes by stage; of what several stages use, with the first of them."""
        made: dict[int, int] = {}
        seen: set[str] = set()
        for stage in self._schedule.stages_of(pp):
            held = [p for p in self._parameters(stage, tp) if p.fqn not in seen]
            alone = [p for p in held if p.is_trained and not needs_bucket(p, self._plan)]
            made[stage] = sum(p.numel for p in alone) * self._gradient_bytes
            seen.update(p.fqn for p in held)
        return made

    def _unsharded(self, stage: int, tp: int) -> int:
        """Elements that UNSHARD gathers: all under ZeRO-2, what several blocks use under ZeRO-3."""
        held = self._parameters(stage, tp)
        return sum(p.numel for p in held if self._level == 2 or p.block is None)

    def _stage(self, stage: int, tp: int, cost: StageCost) -> StageHolding:
        gathered = gradient = 0
        if self._level >= 2:
            units = units_of(self._parameters(stage, tp), self._plan)
            sizes = sorted(
                (sum(p.numel for p in held) for block, held in units if block is not None), reverse=True
            )
            largest = max((sum(p.numel for p in held) for _, held in units), default=0)
            gathered = sum(sizes[:GATHERED_UNITS]) * self._compute_bytes if self._level == 3 else 0
            gradient = largest * (self._compute_bytes + self._gradient_bytes)
        return StageHolding(
            saved=cost.saved,
            deferred_bytes=cost.deferred_bytes,
            transient_bytes=cost.transient_bytes,
            recompute_bytes=cost.recompute_bytes,
            gathered_bytes=gathered,
            unit_gradient_bytes=gradient,
        )

    def _parameters(self, stage: int, tp: int) -> tuple[HeldParameter, ...]:
        if (stage, tp) not in self._held:
            segment = self._costs.segment(stage, tp=tp, size=self._first_size)
            placements = self._costs.stages.sharding_at(self._first_size).parameters
            self._held[stage, tp] = held_parameters(
                segment, placements, self._users, self._schedule.stage_ranks
            )
        return self._held[stage, tp]


def planned_holdings(costs: StageCosts) -> PlannedHoldings:
    """What the ranks of a plan hold by the rules that the engine allocates by."""
    return PlannedHoldings(costs)
