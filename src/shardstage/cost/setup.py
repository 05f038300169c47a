"""``StepSetup``: what the price of a step depends on besides the model and the cluster."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from shardstage.cost.execution import OURS, Execution
from shardstage.cost.profile import Profile
from shardstage.graph.recompute import Recompute, StageRecompute, layer_modes
from shardstage.layout import Mesh
from shardstage.schedule import (
    Schedule,
    held_by_stage,
    held_together,
    make_schedule,
    stages_of_rank,
    steady_microbatches,
)
from shardstage.units import dtype_bytes

__all__ = ["StepSetup"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSetup:
    """``starts`` are the first units of the stages; the other fields are those of a plan.

    ``microbatch`` is the size that the profile was made at, and ``num_microbatches`` run on each data-parallel rank. ``custom`` is a
    schedule that has no name. ``ep`` ranks deal the experts out among them, ``zero_ranks`` share what ZeRO cuts (default: all replicas);
    ``has_whole_experts``: tensor-parallel ranks do not cut experts, and are among those that deal them out.
    ``recompute_of_stages`` says for each stage what ``recompute`` says for all; ``layers`` are those of the units (``fold``), without
    which every unit is one. ``execution`` is how the framework at hand runs all that.
    ``gradient_dtype`` is that of gradients' sums (default: the master weights'). ``is_offloaded``: the optimizer lives in the host's
    memory.
    """

    mesh: Mesh
    starts: tuple[int, ...]
    microbatch: int
    num_microbatches: int
    global_batch: int
    sequence: int | None
    zero: int
    recompute: StageRecompute
    schedule: str
    precision: str
    bucket_bytes: int
    custom: Schedule | None = None
    ep: int = 1
    has_whole_experts: bool = False
    zero_ranks: int | None = None
    recompute_of_stages: tuple[StageRecompute, ...] = ()
    layers: tuple[int, ...] = ()
    execution: Execution = OURS
    gradient_dtype: str | None = None
    is_offloaded: bool = False

    @property
    def sharding_level(self) -> int:
        """The ZeRO level that has an effect: none with a single data-parallel rank."""
        return self.zero if self.num_shards > 1 else 0

    @property
    def num_shards(self) -> int:
        """How many ranks share what ZeRO cuts."""
        return self.zero_ranks or self.mesh.num_replicas

    def with_stages(self, starts: tuple[int, ...], recompute: tuple[StageRecompute, ...]) -> StepSetup:
        """Cut at these units, and what each stage recomputes."""
        is_alike = len({*recompute}) == 1
        return replace(
            self,
            starts=starts,
            recompute=recompute[0] if is_alike else self.recompute,
            recompute_of_stages=() if is_alike else recompute,
        )

    def recompute_of(self, stage: int) -> StageRecompute:
        return self.recompute_of_stages[stage] if self.recompute_of_stages else self.recompute

    def modes_of(self, stage: int, profile: Profile) -> tuple[Recompute, ...]:
        """What each unit of a stage recomputes."""
        own = self.units_of(stage, profile)
        return layer_modes(self.recompute_of(stage), self.layers[own.start : own.stop] or own)

    def part_elements(self, elements: int, expert_elements: int) -> int:
        """Of a rank's elements those that it owns under ZeRO."""
        shards = self.num_shards if self.sharding_level else 1
        return -(-(elements - expert_elements) // shards) + -(-expert_elements // self.expert_shards)

    def reduced_elements(self, elements: int, expert_elements: int) -> int:
        """Of those the ones that come out of a sum over ranks: experts that no other rank holds are summed with nobody's."""
        return self.part_elements(elements, expert_elements) - (
            expert_elements if self.expert_shards == 1 else 0
        )

    @property
    def expert_shards(self) -> int:
        """How many ranks share what ZeRO cuts of experts: ``ep`` times fewer than would share it if all held all."""
        if not self.sharding_level:
            return 1
        holders = self.num_shards * (self.mesh.tp if self.has_whole_experts else 1)
        return max(1, holders // self.ep)

    @property
    def compute_bytes(self) -> int:
        """Bytes of one parameter as it is computed with."""
        return dtype_bytes(self.precision)

    @property
    def master_bytes(self) -> int:
        """Bytes of one moment and of one master weight: float32, or wider where computation is."""
        return max(4, self.compute_bytes)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of one element of a gradient that is summed, over microbatches and over ranks."""
        return dtype_bytes(self.gradient_dtype) if self.gradient_dtype else self.master_bytes

    @property
    def stored_bytes(self) -> int:
        """Bytes of one parameter between steps: as it is computed with, or of ZeRO-2/3's rows, which are as wide as their gradients."""
        return self.gradient_bytes if self.sharding_level >= 2 else self.compute_bytes

    @property
    def has_own_masters(self) -> bool:
        """Whether master weights lie apart from the parameters of which they are copies."""
        return self.is_offloaded or self.stored_bytes != self.master_bytes

    @property
    def accumulation_bytes(self) -> float:
        """Bytes moved for each parameter element to add a microbatch's gradient to the sum: read it, read and write the sum."""
        asked = self.execution.accumulation_bytes
        return self.compute_bytes + 2.0 * self.gradient_bytes if asked is None else asked

    @property
    def wire_bytes(self) -> float:
        """Bytes of one element of a gradient on its way to be summed over data-parallel ranks."""
        return float(self.gradient_bytes) if self.execution.wire_bytes is None else self.execution.wire_bytes

    def units_of(self, stage: int, profile: Profile) -> range:
        """Indices of the units of a stage."""
        is_last = stage + 1 == len(self.starts)
        return range(self.starts[stage], len(profile.units) if is_last else self.starts[stage + 1])

    @property
    def num_stages(self) -> int:
        return len(self.starts)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that a pipeline rank runs."""
        if self.custom is not None:
            return self.custom.stages_of(rank)
        if self.num_stages == self.mesh.pp:
            return (rank,)
        return stages_of_rank(self.schedule, self.num_stages, self.mesh.pp, rank)

    def in_flight(self, stage: int) -> int:
        """Microbatches whose activations a stage holds at most."""
        if self.custom is not None:
            return self.custom.max_held(stage)
        return held_by_stage(
            self.schedule,
            num_stages=len(self.starts),
            num_ranks=self.mesh.pp,
            num_microbatches=self.num_microbatches,
            stage=stage,
        )

    def in_flight_together(self, rank: int) -> tuple[tuple[int, ...], ...]:
        """The same on all stages of a rank at once, at each moment that no other one exceeds."""
        return held_together(
            self.schedule,
            num_stages=len(self.starts),
            num_ranks=self.mesh.pp,
            num_microbatches=self.num_microbatches,
            rank=rank,
        )

    def short_order(self) -> Schedule:
        """The schedule of fewer microbatches: what is held at most is held by the time that the pipeline runs steadily."""
        if self.custom is not None:
            return self.custom
        if self.schedule in ("gpipe", "looped-bfs"):  # hold all microbatches
            return _made(self.schedule, len(self.starts), self.mesh.pp, self.num_microbatches)
        enough = steady_microbatches(self.num_microbatches, self.mesh.pp)
        return _made(self.schedule, len(self.starts), self.mesh.pp, enough)

    def order(self) -> Schedule:
        """The schedule; ``ProgramError`` if the named one does not take so many stages on so many ranks."""
        return self.custom or make_schedule(
            self.schedule,
            num_stages=len(self.starts),
            num_ranks=self.mesh.pp,
            num_microbatches=self.num_microbatches,
        )


@lru_cache(maxsize=256)
def _made(name: str, num_stages: int, num_ranks: int, num_microbatches: int) -> Schedule:
    return make_schedule(name, num_stages=num_stages, num_ranks=num_ranks, num_microbatches=num_microbatches)
