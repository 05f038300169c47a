"""``Space``: everything that a search may choose, declared, counted and enumerated.

    tp × sp × cp × ep × microbatch      a *group*: what a unit of the model costs one rank; tp divides a node, or the ranks
    etp                                 of a group: experts cut over tp, or whole where sequences are parallel, too
    pp, schedule, stages a rank         how the units lie in a pipeline
    dp                                  the ranks that are left, those of whole nodes or of one, or the fewest that run as few microbatches
    ZeRO level, ranks that it cuts over how parameters, gradients and optimizer state lie over the replicas
    order of the axes                   pipeline outside data parallelism, or inside
    savers                              dtype of gradients, offloading: a space each, searched only where nothing fits without (``ladder``)

Inside a choice the cut into stages and what each stage recomputes are solved exactly (``stages``), not enumerated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, NamedTuple

import numpy as np

from shardstage.cluster import Cluster
from shardstage.cost.kernels import num_experts
from shardstage.errors import PlanError
from shardstage.graph import ModelGraph
from shardstage.layout import AXES, Mesh
from shardstage.layout.mesh import Axis
from shardstage.plan import Request
from shardstage.plan.experts import require_dealt
from shardstage.plan.plan import GradientDtype, Offload, Precision, ScheduleName
from shardstage.plan.sequences import can_share_sequences, require_shared

__all__ = [
    "Choice",
    "Group",
    "Savers",
    "Schedule",
    "Space",
    "Zero",
    "are_near",
    "declared_space",
    "ladder",
]

MAX_MICROBATCH_TOKENS: Final = 65_536
"""A larger microbatch is not tried: products of this many rows reach the best rate of every device we know."""

MAX_EVERY_SIZE: Final = 8
"""Microbatches of up to so many samples are all tried; of larger ones two sizes to a doubling, and those that shares are cut into."""

MAX_STAGES_PER_RANK: Final = 8
"""More stages a rank send more often than any pipeline gains: its bubble is already an eighth of 1F1B's."""

MAX_CP: Final = 32
"""Llama 3 trained with 16 at most (Dubey et al., 2024, table 4)."""

ZeroLevel = Literal[0, 1, 2, 3]


class Zero(NamedTuple):
    """A ZeRO level and the ranks that it cuts over; None for all replicas."""

    level: ZeroLevel
    num_ranks: int | None = None


class Schedule(NamedTuple):
    """A schedule and how many stages it gives each rank."""

    name: ScheduleName
    per_rank: int


class Savers(NamedTuple):
    """What is tried only where nothing fits without it: gradients as narrow as computation, the optimizer in the host's memory."""

    gradient_dtype: GradientDtype | None = None
    offload: Offload = "none"

    def beyond(self, others: Savers) -> Savers:
        """What of these is not among others."""
        is_dtype_new = self.gradient_dtype != others.gradient_dtype
        return Savers(
            self.gradient_dtype if is_dtype_new else None,
            self.offload if self.offload != others.offload else "none",
        )

    def __str__(self) -> str:
        """As a shorthand writes them; empty without any."""
        dtype = f"grads={self.gradient_dtype}" if self.gradient_dtype else ""
        place = f"offload={self.offload}" if self.offload != "none" else ""
        return ",".join(filter(None, (dtype, place)))


NO_SAVERS: Final = Savers()


class Group(NamedTuple):
    """Choices whose units cost the same; ``has_whole_experts``: tensor-parallel ranks do not cut experts (etp=1)."""

    tp: int
    is_sequence_parallel: bool
    cp: int
    ep: int
    microbatch: int
    has_whole_experts: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One point of the space; ``shares`` are the samples of each data-parallel rank."""

    mesh: Mesh
    group: Group
    zero: Zero
    schedule: Schedule


DP_OUTSIDE: Final[tuple[Axis, ...]] = ("dp", "pp", "cp", "tp")


@dataclass(frozen=True, kw_only=True)
class Space:
    """What is enumerated for ``num_ranks`` devices and a batch; each field lists the values of one decision."""

    num_ranks: int
    global_batch: int
    tps: tuple[int, ...]
    pps: tuple[int, ...]
    cps: tuple[int, ...]
    eps: tuple[int, ...]
    sequence_parallel: tuple[bool, ...]
    microbatches: tuple[int, ...]
    zeros: tuple[ZeroLevel, ...]
    schedules: tuple[Schedule, ...]
    orders: tuple[tuple[Axis, ...], ...]
    whole_experts: tuple[bool, ...] = (False,)
    dps: tuple[int, ...] = ()
    node_size: int = 1
    zero_ranks: int | None = None
    uses_all_ranks: bool = False
    savers: Savers = NO_SAVERS
    recompute_modules: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """A hash of the declaration."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    def groups(self) -> Iterator[Group]:
        for tp in self.tps:
            for cp in self.cps:
                if tp * cp > self.num_ranks:
                    continue
                for is_sp in self.sequence_parallel if tp > 1 else (False,):
                    for is_whole in self.whole_experts_at(tp, is_sp=is_sp):
                        for ep in self.eps:
                            for microbatch in self.microbatches:
                                yield Group(tp, is_sp, cp, ep, microbatch, is_whole)

    def whole_experts_at(self, tp: int, *, is_sp: bool) -> tuple[bool, ...]:
        """Experts may be whole where sequences are parallel, too, if that may be chosen: tokens are cut there anyway."""
        if tp == 1:
            return (False,)
        return tuple(
            each for each in self.whole_experts if not each or is_sp or True not in self.sequence_parallel
        )

    def meshes(self, tp: int, cp: int) -> Iterator[Mesh]:
        """Meshes without their orders: as many data-parallel ranks as are left, as whole nodes or one node have, or the fewest with as
        small a share."""
        for pp in self.pps:
            for dp in self._dps(tp * cp * pp):
                mesh = Mesh(pp=pp, dp=dp, tp=tp, cp=cp)
                if not self.uses_all_ranks or mesh.world_size == self.num_ranks:
                    yield mesh

    def takes(self, group: Group, mesh: Mesh, share: int) -> bool:
        """Whether ranks with so many samples run microbatches of exactly the group's size, none of them empty, and hold its experts."""
        is_dealt = self.deals(
            group.tp, group.cp, group.ep, mesh.dp, are_near(mesh), is_whole=group.has_whole_experts
        )
        return bool(self.sizes(group.microbatch, mesh.dp, share) and is_dealt)

    def sizes(self, microbatch: Any, dp: Any, share: Any) -> Any:
        """Which meshes (arrays of their dp and largest share) run microbatches of exactly such a size, none of them empty."""
        num_microbatches = np.ceil(share / microbatch)
        is_exact = np.ceil(share / num_microbatches) == microbatch
        return is_exact & (self.global_batch // dp >= num_microbatches)

    def deals(self, tp: int, cp: int, ep: Any, dp: Any, is_near: Any, *, is_whole: bool) -> Any:
        """Which meshes deal experts out evenly over so many ranks, which are neighbours."""
        holders = dp * cp * (tp if is_whole else 1)
        return (holders % ep == 0) & (is_near | (not is_whole and ep == 1))

    def zeros_of(self, mesh: Mesh) -> tuple[Zero, ...]:
        """ZeRO over all replicas, or over those of a node where more nodes hold copies; over ``zero_ranks`` alone where that is given."""
        replicas, near = mesh.num_replicas, self.near_ranks(mesh.tp)
        if self.zero_ranks is not None:
            is_cut = 1 < near <= replicas and replicas % near == 0
            return tuple(Zero(level, near) for level in self.zeros if level and is_cut)
        if replicas == 1:
            return (Zero(0),) if 0 in self.zeros else (Zero(self.zeros[0]),)
        levels = [Zero(level) for level in self.zeros]
        if 1 < near < replicas and replicas % near == 0:
            levels += [Zero(level, near) for level in self.zeros if level]
        return tuple(levels)

    def near_ranks(self, tp: int) -> int:
        """Over how many replicas ZeRO cuts where others hold copies: those of a node, where nothing was said."""
        return self.zero_ranks or max(1, self.node_size // tp)

    @property
    def dominated(self) -> frozenset[Schedule]:
        """Schedules that another one of the space equals in time, by formula, and never exceeds in memory: GPipe by 1F1B, breadth-first by
        interleaved 1F1B."""
        better = {"gpipe": "1f1b", "looped-bfs": "interleaved-1f1b"}
        offered = {(s.name, s.per_rank) for s in self.schedules}
        return frozenset(s for s in self.schedules if (better.get(s.name, ""), s.per_rank) in offered)

    def schedules_of(self, pp: int) -> tuple[Schedule, ...]:
        if pp == 1:
            return (Schedule("1f1b", 1),) if Schedule("1f1b", 1) in self.schedules else self.schedules[:1]
        return self.schedules

    def orders_of(self, mesh: Mesh) -> tuple[tuple[Axis, ...], ...]:
        """Which axis lies outside matters where both have ranks; with cp the replicas must be neighbours."""
        if mesh.pp == 1 or mesh.dp == 1:
            return self.orders[:1]
        return tuple(order for order in self.orders if mesh.cp == 1 or order == AXES)

    def shares(self) -> Iterator[int]:
        """The largest share of a data-parallel rank, for the meshes with the shortest pipeline."""
        for tp in self.tps:
            for cp in self.cps:
                for dp in self._dps(tp * cp * self.pps[0]):
                    yield -(-self.global_batch // dp)

    def _dps(self, num_together: int) -> tuple[int, ...]:
        """How many times so many ranks there may be."""
        most = min(self.num_ranks // num_together, self.global_batch)
        if self.dps:
            return tuple(dp for dp in self.dps if dp <= most)
        if most < 1:
            return ()
        if self.uses_all_ranks:
            return (most,)
        fewest = -(-self.global_batch // (-(-self.global_batch // most)))
        in_nodes = (self.num_ranks - self.num_ranks % self.node_size) // num_together
        fewer = (fewest, min(most, in_nodes), min(most, self.node_size // num_together))
        return tuple(dict.fromkeys((most, *(dp for dp in fewer if dp))))


def are_near(mesh: Mesh) -> bool:
    """Whether the ranks that hold the same parameters are neighbours, but for tensor-parallel ones."""
    return mesh.order == AXES or mesh.pp == 1 or mesh.dp == 1


def declared_space(
    graph: ModelGraph,
    cluster: Cluster,
    *,
    num_ranks: int,
    global_batch: int,
    sequence: int | None,
    num_units: int,
    may_have_whole_experts: bool = False,
    fix: Request | None = None,
    fixed: frozenset[str] = frozenset(),
    is_runnable: bool = False,
    savers: Savers = NO_SAVERS,
) -> Space:
    """The whole space of a model on a cluster, or what is left of it where ``fixed`` names decisions that ``fix`` has taken.

    ``is_runnable`` leaves out what this release prices but cannot run: context and expert parallelism, ZeRO over a part of the replicas,
    another order of the axes and idle ranks.
    """
    request = fix or Request()
    node = cluster.devices_per(cluster.levels[0])
    may_cut = sequence is not None and graph.is_sequence_scalable and not is_runnable
    may_cut, number = may_cut and can_share_sequences(graph), num_experts(graph)

    def taken(name: str, offered: Iterable[Any]) -> tuple[Any, ...]:
        return (getattr(request, name),) if name in fixed else tuple(offered)

    if "ep" in fixed:
        require_dealt(request.ep, graph)
    if "cp" in fixed:
        require_shared(request.cp, graph)
    tps = taken("tp", _tps(num_ranks, node))
    whole_experts: tuple[bool, ...] = (False,)
    if may_have_whole_experts and not is_runnable:
        whole_experts = (False, True)
    if "etp" in fixed and request.etp is not None:
        tps, whole_experts = _of_expert_ranks(request.etp, tps, whole_experts)
    space = Space(
        num_ranks=num_ranks,
        global_batch=global_batch,
        tps=tps,
        pps=taken("pp", range(1, min(num_units, num_ranks) + 1)),
        cps=taken("cp", _cps(sequence or 1) if may_cut else (1,)),
        eps=taken("ep", _divisors(number) if number and not is_runnable else (1,)),
        sequence_parallel=taken("is_sequence_parallel", (False, True)),
        microbatches=taken("microbatch", _microbatches(graph, global_batch, sequence)),
        zeros=taken("zero", (0, 1, 2, 3)),
        schedules=tuple(_schedules(request, fixed)),
        orders=_orders(request, fixed, is_runnable=is_runnable),
        whole_experts=whole_experts,
        dps=taken("dp", ()),
        node_size=1 if is_runnable else node,
        zero_ranks=request.zero_ranks if "zero_ranks" in fixed else None,
        uses_all_ranks=is_runnable,
        savers=savers,
        recompute_modules=request.recompute_modules,
    )
    is_open = "microbatch" not in fixed and graph.is_scalable
    return replace(space, microbatches=_with_whole_shares(space)) if is_open else space


def ladder(
    precision: Precision, fix: Request, fixed: frozenset[str], *, has_host: bool = True
) -> tuple[Savers, ...]:
    """What is searched one after the other until something fits: without savers, with narrow gradients where computation is as narrow,
    with the optimizer offloaded where there is a host apart from the device, with both. What ``fixed`` names stays as ``fix`` has it."""
    dtypes: tuple[GradientDtype | None, ...] = (None, "bfloat16") if precision == "bfloat16" else (None,)
    offloads: tuple[Offload, ...] = ("none", "optimizer") if has_host else ("none",)
    if "gradient_dtype" in fixed:
        dtypes = (fix.gradient_dtype,)
    if "offload" in fixed:
        offloads = (fix.offload,)
    return tuple(Savers(dtype, offload) for offload in offloads for dtype in dtypes)


def _orders(request: Request, fixed: frozenset[str], *, is_runnable: bool) -> tuple[tuple[Axis, ...], ...]:
    if "dp_outside" in fixed:
        return (DP_OUTSIDE,) if request.dp_outside else (AXES,)
    return (AXES,) if is_runnable else (AXES, DP_OUTSIDE)


def _of_expert_ranks(
    etp: int, tps: tuple[int, ...], whole_experts: tuple[bool, ...]
) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """What is left where so many tensor-parallel ranks are to cut an expert: all of them, or none."""
    if whole_experts == (False,):
        raise PlanError(
            f"etp={etp} says how many ranks cut an expert, and this model has no layer of experts whose tokens can be dealt out to ranks",
            hint=f"leave out etp={etp}",
        )
    if etp == 1:
        return tps, (True,)
    if etp not in tps:
        raise PlanError(
            f"etp={etp} cannot be: an expert is cut over all tensor-parallel ranks, or whole on each, "
            f"and tp may be {', '.join(map(str, tps))}",
            hint="--fix etp=1",
        )
    return (etp,), (False,)


def _tps(num_ranks: int, node: int) -> Iterator[int]:
    """What divides a node or the ranks, and one size beyond the node, so that a search can say what leaving it costs."""
    for tp in (*range(1, min(node, num_ranks) + 1), 2 * node):
        if tp <= num_ranks and not (node % tp and num_ranks % tp and tp != 2 * node):
            yield tp


def _cps(sequence: int) -> Iterator[int]:
    """Powers of two that cut the sequence evenly."""
    yield from (cp for cp in (1 << n for n in range(MAX_CP.bit_length())) if not sequence % cp)


def _divisors(number: int) -> Iterator[int]:
    yield from (n for n in range(1, number + 1) if not number % n)


def _schedules(request: Request, fixed: frozenset[str]) -> Iterator[Schedule]:
    """All schedules with all numbers of stages a rank, as far as nothing was said of them."""
    several = range(2, MAX_STAGES_PER_RANK + 1)
    for schedule in (
        *(Schedule("1f1b", 1), Schedule("gpipe", 1), Schedule("zb-h1", 1), Schedule("zb-v", 2)),
        Schedule("dualpipe-v", 2),
        *(Schedule("interleaved-1f1b", v) for v in several),
        *(Schedule("looped-bfs", v) for v in several),
    ):
        if "schedule" in fixed and schedule.name != request.schedule:
            continue
        if "stages_per_rank" in fixed and schedule.per_rank != request.stages_per_rank:
            continue
        yield schedule


def _microbatches(graph: ModelGraph, global_batch: int, sequence: int | None) -> Iterator[int]:
    """One to eight samples, then two steps to each doubling (12, 16, 24, …), as far as a microbatch's tokens go; what else shares are cut
    into evenly is added to them (``_with_whole_shares``)."""
    if not graph.is_scalable:
        yield graph.microbatch
        return
    limit = min(global_batch, max(1, MAX_MICROBATCH_TOKENS // (sequence or 1)))
    sizes = {
        *range(1, MAX_EVERY_SIZE + 1),
        *(step << power for power in range(limit.bit_length()) for step in (2, 3)),
        limit,
    }
    yield from sorted(size for size in sizes if size <= limit)


def _with_whole_shares(space: Space) -> tuple[int, ...]:
    """The sizes of a space, and what shares are cut into evenly by the fewest microbatches of at most 16, 32, … samples: 13 samples are one
    of 13, 25 are one of 25 or two of 13."""
    most = space.microbatches[-1]
    caps = (*(1 << power for power in range(MAX_EVERY_SIZE.bit_length(), most.bit_length())), most)
    even = (-(-share // (-(-share // cap))) for share in {*space.shares()} for cap in caps)
    return tuple(sorted({*space.microbatches, *even}))
