"""``planned_prices``: seconds of a Program's instructions on a described cluster, from the cost model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from shardstage.cluster import UNCALIBRATED, Cluster, DeviceClass, more_devices
from shardstage.cost.compute import optimizer_s
from shardstage.cost.links import overlap_slowdown
from shardstage.cost.offload import offloaded_update_s
from shardstage.cost.parts import cause_of_axis
from shardstage.errors import PlanError
from shardstage.graph import ModelGraph
from shardstage.layout import Mesh
from shardstage.plan import Plan
from shardstage.program import Collective, StageGraphs
from shardstage.program.instruction import InstructionKind
from shardstage.program.stage_parameters import gradient_dtype, master_dtype
from shardstage.simulator.holdings import Holdings, planned_holdings
from shardstage.simulator.prices import Wire
from shardstage.simulator.stage_costs import StageCosts
from shardstage.units import dtype_bytes

__all__ = ["PlannedPrices", "planned_prices"]


@dataclass(frozen=True, kw_only=True)
class PlannedPrices:
    """Prices of a plan on a cluster.

    Beside compute run collectives, which slow it down as the device's kernel model says, and messages: not at all on GPUs, where they take
    a channel or two, and wholly where cores do both.

    Ranks that share cores leave them to each other while they wait (``alone_ratio``, ``message`` of the device): what they compute, and
    both ends of their messages, is priced as of a rank alone and served by as many cores as make all ranks at a time as quick as measured.
    The update is at that pace: all ranks do it at once. Devices of several classes are taken to share nothing.

    Each duration is multiplied by the cluster's calibration of its cause, as the step formula's parts are; of collectives beside compute
    what does not hide, which is found before either is multiplied. How long ranks idle comes of these: the formula weighs the pipeline's
    bubble by ``pp``. ``costs`` are those of each class of devices, ``formula`` the same before the calibration.
    A host that launches slower than its GPU computes holds it up as in the formula (``launches``).
    """

    costs: tuple[StageCosts, ...]
    formula: tuple[StageCosts, ...]
    cluster: Cluster
    holdings: Holdings
    special_ranks: tuple[int, ...] = ()
    _update_s: dict[tuple[int, int], float] = field(default_factory=dict, repr=False)

    @property
    def plan(self) -> Plan:
        return self.costs[0].plan

    @property
    def mesh(self) -> Mesh:
        return self.plan.mesh

    @property
    def classes(self) -> tuple[range, ...]:
        return tuple(part.ranks for part in self.cluster.parts) if self.cluster.is_mixed else ()

    @property
    def alone_ratio(self) -> float:
        """How many times quicker a rank is while no other wants its cores."""
        return 1.0 if self.cluster.is_mixed else self.cluster.device.alone_ratio

    @property
    def num_cores(self) -> float | None:
        return self.mesh.world_size / self.alone_ratio if self.alone_ratio > 1 else None

    @property
    def slowdown(self) -> float:
        return 1.0 if self.cluster.device.kind == "cuda" or self.num_cores else 2.0

    @property
    def overlap_slowdown(self) -> float:
        return max(overlap_slowdown(part.device) for part in self.cluster.parts)

    def compute_s(self, rank: int, stage: int, kind: InstructionKind, size: int) -> float:
        return self._compute_s(self.costs, rank, stage, kind, size)

    def pace(self, rank: int, stage: int, kind: InstructionKind, size: int) -> float:
        if self.formula == self.costs:
            return 1.0
        formula_s = self._compute_s(self.formula, rank, stage, kind, size)
        return self.compute_s(rank, stage, kind, size) / formula_s if formula_s else 1.0

    def _compute_s(
        self, costs: Sequence[StageCosts], rank: int, stage: int, kind: InstructionKind, size: int
    ) -> float:
        of_class = costs[self.cluster.part_of(rank)]
        cost = of_class.cost(stage, tp=self.mesh.coordinate(rank, "tp"), size=size)
        all_busy_s = {"F": cost.forward_s, "B": cost.backward_s, "I": cost.input_s, "W": cost.weight_s}[kind]
        return all_busy_s / self.alone_ratio

    def collective(self, collective: Collective, group: Sequence[int]) -> Wire:
        cost = self.cluster.collective(collective.kind, group)
        factor = self.cluster.factors[cause_of_axis(collective.axis)]
        return Wire(cost.latency_s, collective.num_bytes / cost.bytes_per_s, factor)

    def transfer(self, num_bytes: int, source: int, target: int) -> Wire:
        cost, factor = self.cluster.collective("p2p", (source, target)), self.cluster.factors["pp"]
        message, core_s = self.cluster.device.message, 0.0
        if message is not None and self.num_cores:
            core_s = message.seconds(num_bytes) / self.alone_ratio
        # A message was measured from when it is sent until it was received: both ends' work is in it.
        on_way_s = max(0.0, cost.seconds(num_bytes) - 2 * core_s)
        bytes_s = min(on_way_s, num_bytes / cost.bytes_per_s)
        return Wire(factor * (on_way_s - bytes_s), factor * bytes_s, core_s=factor * core_s)

    def own_s(self, rank: int, kind: InstructionKind, stage: int | None, num_bytes: int) -> float:
        """STEP: the optimizer over what the rank owns."""
        if kind != "STEP":
            return 0.0
        key = self.mesh.coordinate(rank, "pp"), self.cluster.part_of(rank)
        if key not in self._update_s:
            owned = self.holdings.rank(rank).owned_elements
            seconds = self._optimizer_s(owned, self.cluster.device_at(rank))
            self._update_s[key] = self.cluster.factors["memory"] * seconds
        return self._update_s[key]

    def _optimizer_s(self, owned: int, device: DeviceClass) -> float:
        plan = self.plan
        element_bytes = dtype_bytes(master_dtype(plan))
        if plan.offload != "optimizer":
            return optimizer_s(
                owned, element_bytes, max(1, owned * element_bytes // plan.bucket_bytes), device
            )
        down_bytes = dtype_bytes(gradient_dtype(plan))
        is_cut = plan.zero >= 2 and plan.mesh.dp > 1
        return offloaded_update_s(
            owned,
            device,
            down_bytes=down_bytes,
            up_bytes=down_bytes if is_cut else dtype_bytes(plan.precision),
            element_bytes=element_bytes,
        )

    @property
    def levels(self) -> tuple[str, ...]:
        return tuple(level.name for level in self.cluster.levels)

    def level_of(self, group: Sequence[int]) -> str:
        return self.cluster.level_for(group).name


def planned_prices(
    graph: ModelGraph, plan: Plan, cluster: Cluster, *, stages: StageGraphs | None = None
) -> PlannedPrices:
    """Prices from the cost model; ``stages`` are the plan's stage graphs where the caller has them.

    Raises ``PlanError`` if the cluster is smaller than the plan.
    """
    if plan.mesh.world_size > cluster.num_devices:
        raise PlanError(
            f"the plan is for {plan.mesh.world_size} ranks, and cluster {cluster.name!r} has {cluster.num_devices} devices",
            hint=more_devices(cluster, plan.mesh.world_size),
        )
    stages = stages or StageGraphs(graph, plan)
    machines = [cluster.part(number) for number in range(len(cluster.parts))]
    costs = formula = tuple(StageCosts(stages, machine, cluster.factors) for machine in machines)
    if cluster.factors != UNCALIBRATED:
        formula = tuple(StageCosts(stages, machine, UNCALIBRATED) for machine in machines)
    return PlannedPrices(costs=costs, formula=formula, cluster=cluster, holdings=planned_holdings(costs[0]))
