"""``with_optimal_order``: a plan whose schedule is searched for its own stages."""

from __future__ import annotations

from dataclasses import replace

from shardstage.cluster import Cluster, LinkLevel
from shardstage.cost import Folded, Links, Profile, Profiler, StepSetup, fold, rank_memory, stage_times
from shardstage.cost.compute import RELATIVE
from shardstage.cost.pipeline import cut_backward
from shardstage.graph import ModelGraph
from shardstage.plan.plan import Plan
from shardstage.schedule import Schedule, StageBytes

__all__ = ["any_cluster", "profile_of", "setup_of", "with_optimal_order"]


def with_optimal_order(plan: Plan, graph: ModelGraph, cluster: Cluster | None = None) -> Plan:
    """The plan with the fastest order of its microbatches that a search of two seconds finds, written out: never slower than a named one.

    Stages take what the cluster's prices say, and activations what its memory leaves; without a cluster only the balance of compute
    counts, and transfers take no time. A plan without stages stays as it is.
    """
    if plan.mesh.pp == 1:
        return replace(plan, schedule="1f1b")
    from shardstage.schedule.search import optimal  # seldom asked for, and long to load

    named = replace(plan, schedule="gpipe" if plan.stages_per_rank == 1 else "looped-bfs")
    machine = cluster or any_cluster(plan.mesh.world_size)
    boundaries = _boundaries(plan, graph)
    folded = fold(graph, boundaries=boundaries, modules=plan.recompute_modules)
    setup = setup_of(named, folded, tuple(folded.unit_at(position) for position in boundaries))
    priced, links = profile_of(plan, folded, setup, machine)
    times = [cut_backward(time) for time in stage_times(priced, setup, links)]
    found = optimal(
        times,
        plan.num_microbatches,
        num_ranks=plan.mesh.pp,
        memory=_held(priced, setup),
        memory_limit_bytes=None if cluster is None else _left_bytes(priced, setup, cluster),
    )
    return _written(plan, found.schedule)


def setup_of(
    plan: Plan, folded: Folded, starts: tuple[int, ...], custom: Schedule | None = None
) -> StepSetup:
    """What of a plan its price depends on, with stages that begin at the folded units ``starts`` and its schedule where that has no name.

    Priced is the data-parallel rank with the largest share, which the others wait for.
    """
    return StepSetup(
        mesh=plan.mesh,
        starts=starts,
        microbatch=-(-max(plan.shares) // plan.num_microbatches),
        num_microbatches=plan.num_microbatches,
        global_batch=plan.global_batch,
        sequence=plan.sequence,
        zero=plan.zero,
        recompute=plan.recompute,
        recompute_of_stages=plan.stage_recompute,
        layers=folded.layers,
        ep=plan.ep,
        has_whole_experts=plan.etp == 1,
        zero_ranks=plan.zero_ranks,
        schedule=plan.schedule,
        custom=custom,
        precision=plan.precision,
        gradient_dtype=plan.gradient_dtype,
        is_offloaded=plan.offload == "optimizer",
        bucket_bytes=plan.bucket_bytes,
    )


def profile_of(plan: Plan, folded: Folded, setup: StepSetup, cluster: Cluster) -> tuple[Profile, Links]:
    """What the plan's units cost on a cluster, and what its ranks talk over; ``setup`` is ``setup_of`` it."""
    profiler = Profiler(
        folded,
        cluster,
        tp=plan.mesh.tp,
        sequence=plan.sequence,
        is_sequence_parallel=plan.is_sequence_parallel,
        replicate=plan.replicate,
        is_compiled=plan.is_compiled,
    )
    if setup.has_whole_experts:
        profiler = profiler.with_whole_experts()
    links = Links(
        cluster,
        plan.mesh,
        num_shards=plan.zero_ranks,
        ep=plan.ep,
        has_whole_experts=setup.has_whole_experts,
    )
    return profiler.at(setup.microbatch, links), links


def any_cluster(num_devices: int) -> Cluster:
    """Devices of which only relative times mean something, on links that take no time."""
    level = LinkLevel(name="any", size=num_devices, latency_s=0.0, bytes_per_s=1e30, source=RELATIVE.source)
    return Cluster(name="any", device=RELATIVE, num_devices=num_devices, levels=(level,))


def _boundaries(plan: Plan, graph: ModelGraph) -> tuple[int, ...]:
    positions = {op.name: index for index, op in enumerate(graph.ops)}
    return tuple(positions[stage.first] for stage in plan.stages)


def _held(priced: Profile, setup: StepSetup) -> list[StageBytes]:
    """Activations of one microbatch on each stage."""
    found = []
    for stage in range(setup.num_stages):
        units = [priced.units[index] for index in setup.units_of(stage, priced)]
        modes = setup.modes_of(stage, priced)
        saved = sum(unit.kept[mode].saved_bytes for unit, mode in zip(units, modes, strict=True))
        found.append(StageBytes(held_bytes=saved + (units[0].input_bytes if stage else 0)))
    return found


def _left_bytes(priced: Profile, setup: StepSetup, cluster: Cluster) -> int:
    """What a device has for activations, on the rank that keeps most of everything else; at least one byte, lest a search be refused
    that a check of the plan will refuse with better words."""
    uses = [rank_memory(priced, setup, rank) for rank in range(setup.mesh.pp)]
    kept = max(use.total_bytes - use.activations for use in uses)
    least = max(bytes_.held_bytes for bytes_ in _held(priced, setup)) * setup.num_stages
    return max(cluster.device.memory_bytes - kept, least)


def _written(plan: Plan, schedule: Schedule) -> Plan:
    return replace(
        plan, schedule="custom", actions=tuple(" ".join(map(str, row)) for row in schedule.actions)
    )
