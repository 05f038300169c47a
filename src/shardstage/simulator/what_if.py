"""``what_if``: the same step on other links, with one slow device, on more nodes, in other microbatches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from shardstage.errors import ConfigError
from shardstage.layout import Mesh
from shardstage.plan import Plan
from shardstage.plan.complete import proportional_shares
from shardstage.program import Collective, Program
from shardstage.program.instruction import InstructionKind
from shardstage.simulator.change import Change
from shardstage.simulator.prices import Prices, Wire
from shardstage.simulator.simulate import step_time

__all__ = ["ChangedPrices", "Lower", "WhatIf", "changed_plan", "changed_prices", "what_if"]

Lower = Callable[[Change], tuple[Program, Prices]]
"""Plans, lowers and prices anew what a change of the plan asks for (``changed_plan`` helps)."""


@dataclass(frozen=True, kw_only=True)
class WhatIf:
    """Seconds of a step and samples a second before and after."""

    change: Change
    before_s: float
    after_s: float
    samples_per_s_before: float
    samples_per_s_after: float

    @property
    def speed_up(self) -> float:
        """Samples a second after over before."""
        return self.samples_per_s_after / self.samples_per_s_before


def what_if(program: Program, prices: Prices, change: Change, *, lower: Lower | None = None) -> WhatIf:
    """What a change would do. ``ConfigError`` if it asks for another plan and there is no ``lower``, or for what is not there."""
    if change.is_of_prices:
        after: tuple[Program, Prices] = program, changed_prices(program.mesh, prices, change)
    elif lower is not None:
        after = lower(change)
    else:
        raise ConfigError(
            f"{change} changes the plan, and this program's model is not at hand",
            hint='--what-if "bandwidth=0.5"',
        )
    before_s, after_s = step_time(program, prices), step_time(*after)
    return WhatIf(
        change=change,
        before_s=before_s,
        after_s=after_s,
        samples_per_s_before=program.global_batch / before_s,
        samples_per_s_after=after[0].global_batch / after_s,
    )


@dataclass(frozen=True, kw_only=True)
class ChangedPrices:
    """Other prices with faster or slower links, or one slow device."""

    prices: Prices
    change: Change

    @property
    def slowdown(self) -> float:
        return self.prices.slowdown

    @property
    def overlap_slowdown(self) -> float:
        return self.prices.overlap_slowdown

    @property
    def num_cores(self) -> float | None:
        return self.prices.num_cores

    @property
    def special_ranks(self) -> tuple[int, ...]:
        own = (self.change.rank,) if self.change.kind == "slow" else ()
        return (*self.prices.special_ranks, *own)

    @property
    def classes(self) -> tuple[range, ...]:
        return self.prices.classes

    def compute_s(self, rank: int, stage: int, kind: InstructionKind, size: int) -> float:
        return self._slowed(rank, self.prices.compute_s(rank, stage, kind, size))

    def pace(self, rank: int, stage: int, kind: InstructionKind, size: int) -> float:
        return self.prices.pace(rank, stage, kind, size)

    def collective(self, collective: Collective, group: Sequence[int]) -> Wire:
        return self._rewired(self.prices.collective(collective, group), group)

    def transfer(self, num_bytes: int, source: int, target: int) -> Wire:
        return self._rewired(self.prices.transfer(num_bytes, source, target), (source, target))

    def own_s(self, rank: int, kind: InstructionKind, stage: int | None, num_bytes: int) -> float:
        return self._slowed(rank, self.prices.own_s(rank, kind, stage, num_bytes))

    @property
    def levels(self) -> tuple[str, ...]:
        return self.prices.levels

    def level_of(self, group: Sequence[int]) -> str:
        return self.prices.level_of(group)

    def _slowed(self, rank: int, seconds: float) -> float:
        is_slow = self.change.kind == "slow" and rank == self.change.rank
        return seconds * self.change.value if is_slow else seconds

    def _rewired(self, wire: Wire, group: Sequence[int]) -> Wire:
        change = self.change
        if len(group) < 2 or (change.level and self.prices.level_of(group) != change.level):
            return wire
        if change.kind == "bandwidth":
            return wire._replace(bytes_s=wire.bytes_s / change.value)
        if change.kind == "latency":
            return wire._replace(latency_s=wire.latency_s * change.value)
        return wire


def changed_prices(mesh: Mesh, prices: Prices, change: Change) -> ChangedPrices:
    """Prices after a change of links or of one device; ``ConfigError`` for a rank or a link level that is not there."""
    if change.kind == "slow" and change.rank >= mesh.world_size:
        raise ConfigError(
            f"{change}: there are ranks 0 to {mesh.world_size - 1}",
            hint=f'--what-if "slow={mesh.world_size - 1}:{change.value:g}"',
        )
    if change.level and change.level not in prices.levels:
        known = ", ".join(prices.levels) or "none"
        raise ConfigError(
            f"{change}: there is no link level {change.level!r}; the cluster's are: {known}",
            hint=f'--what-if "{change.kind}={change.value:g}"',
        )
    return ChangedPrices(prices=prices, change=change)


def changed_plan(plan: Plan, change: Change, *, devices_per_node: int) -> Plan:
    """The plan after ``nodes``, ``dp`` or ``microbatch``: the batch is shared anew over dp in the old proportions where dp stays.

    Raises ``ConfigError`` if no such plan can be.
    """
    if change.kind == "microbatch":
        return replace(plan, microbatch=min(int(change.value), max(plan.shares)))
    mesh = plan.mesh
    dp = int(change.value) if change.kind == "dp" else _dp_after(mesh, change, devices_per_node)
    if not 1 <= dp <= plan.global_batch:
        raise ConfigError(
            f"{change} makes {dp} data-parallel ranks, and a batch of {plan.global_batch} samples feeds 1 to {plan.global_batch}",
            hint=f'--what-if "dp={plan.global_batch}"',
        )
    return replace(
        plan,
        mesh=Mesh(pp=mesh.pp, dp=dp, tp=mesh.tp),
        shares=proportional_shares(plan.global_batch, (1,) * dp),
    )


def _dp_after(mesh: Mesh, change: Change, devices_per_node: int) -> int:
    """dp grows by what the new nodes hold of whole model copies."""
    ranks, per_copy = mesh.world_size + int(change.value) * devices_per_node, mesh.pp * mesh.tp
    if ranks < per_copy:
        raise ConfigError(
            f"{change} leaves {max(0, ranks)} ranks, and one copy of the model takes {per_copy} (pp={mesh.pp} × tp={mesh.tp})",
            hint='--what-if "nodes=+1"',
        )
    return ranks // per_copy
