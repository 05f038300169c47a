"""``predict_step``: how long a step takes, and what each rank holds.

    step = pipeline + exposed reduction of gradients + optimizer + the norm's sum

    pipeline   the schedule's formula over the stages' forward and backward seconds (``pipeline_s``)
    forward    Σ units: kernels, or their launches where the host is slower, and talk along tp, which nothing hides
    backward   the same, what is recomputed, and adding a microbatch's gradients to their sums
    exposed    what of the gradients' reduction the last backward does not hide; its last bucket never is
    ZeRO-2/3   gathers and reductions of every microbatch, hidden by compute but for the first and the last unit

How much hides under compute is the device's (``links.exposed_s``), and whether the framework lets it (``Execution``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from types import MappingProxyType
from typing import Final, NamedTuple

from shardstage.cost.compute import dispatch_s, moved_s, optimizer_s
from shardstage.cost.links import Links, exposed_s
from shardstage.cost.memory import MemoryUse, rank_memory, stage_elements, stage_memory
from shardstage.cost.offload import offloaded_update_s
from shardstage.cost.parts import Parts, compute_parts
from shardstage.cost.pipeline import StageTime, pipeline_s, run_pipeline
from shardstage.cost.profile import Profile, UnitCost
from shardstage.cost.setup import StepSetup

__all__ = ["Prediction", "StagePrediction", "least_step_s", "predict_step", "stage_times", "step_seconds"]


class Spread(NamedTuple):
    """Measured over modelled step time: 10th percentile, median, 90th percentile."""

    low: float
    expected: float
    high: float


CALIBRATIONS: Final = MappingProxyType({"cuda": Spread(0.92, 1.0, 1.15), "cpu": Spread(0.8, 1.0, 1.5)})
"""What the formulas leave out on a cluster whose own runs were not looked at, by kind of device. cuda: the spread of published runs
(benchmarks/planner/step_time). cpu: our estimate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePrediction:
    """One stage on one of its ranks: seconds of a microbatch, its share of all stages' compute, bytes at the peak."""

    forward_s: float
    backward_s: float
    compute_ratio: float
    num_elements: int
    memory: MemoryUse


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a step is expected to take, calibrated; its parts (stages, ``exposed_*_s``, ``optimizer_s``) are as the formulas give them.

    ``parts`` are the seconds by cause (``cluster.CAUSES``) that add up to the step, before calibration.
    ``exposed_*_s`` are seconds of the slowest stage that wait for an axis, ``bubble_ratio`` is the share of the pipeline's time in
    which the average stage idles. ``mfu`` counts three forwards a sample (Chowdhery et al., "PaLM", 2022, appendix B), attention in
    full, over the device's best rate.
    """

    step_time_s: float
    step_time_low_s: float
    step_time_high_s: float
    parts: Mapping[str, float] = field(hash=False)
    stages: tuple[StagePrediction, ...]
    ranks: tuple[MemoryUse, ...]
    bubble_ratio: float
    exposed_dp_s: float
    exposed_tp_s: float
    exposed_pp_s: float
    optimizer_s: float
    samples_per_s: float
    tokens_per_s: float
    mfu: float

    def rank_peak_bytes(self, pp: int) -> int:
        """Predicted peak of the ranks at this pipeline coordinate."""
        return self.ranks[pp].total_bytes

    @property
    def peak_bytes(self) -> int:
        """Of the rank that holds most."""
        return max(memory.total_bytes for memory in self.ranks)

    @property
    def host_bytes(self) -> int:
        """Of the host's memory, for the rank that takes most of it."""
        return max(memory.host for memory in self.ranks)


def predict_step(
    profile: Profile, setup: StepSetup, links: Links, ranks: Sequence[MemoryUse] | None = None
) -> Prediction:
    """Seconds and bytes of one step on the links' cluster; ``ranks`` are what they hold, where that is known already."""
    cluster = links.cluster
    times = stage_times(profile, setup, links)
    m, num_stages, num_ranks = setup.num_microbatches, setup.num_stages, setup.mesh.pp
    end_s = _pipeline_s(setup, times)
    travel_s = end_s - _pipeline_s(setup, [time._replace(receive_s=0.0) for time in times])
    exposed = _exposed_s(profile, setup, links, times)
    update = _of_busiest_rank(setup, [_update_s(profile, setup, links, s) for s in range(num_stages)])
    parts = _parts(profile, setup, links, times)
    low_s, step_s, high_s = _range_s(parts, links)
    busy = [m * (time.forward_s + time.backward_s) for time in times]
    talk = [
        m * sum(u.tp_forward_s + u.tp_backward_s for u in _units(profile, setup, s))
        for s in range(num_stages)
    ]
    gathering = [sum(_waits(profile, setup, links, s)) for s in range(num_stages)]
    rate = cluster.device.rate(setup.precision) * setup.mesh.world_size
    return Prediction(
        step_time_s=step_s,
        step_time_low_s=low_s,
        step_time_high_s=high_s,
        parts=parts._asdict(),
        stages=_stages(profile, setup, times),
        ranks=tuple(ranks or (rank_memory(profile, setup, rank) for rank in range(num_ranks))),
        bubble_ratio=1 - sum(busy) / (num_ranks * end_s),
        exposed_dp_s=exposed + m * _of_busiest_rank(setup, gathering),
        exposed_tp_s=_of_busiest_rank(setup, talk),
        exposed_pp_s=travel_s,
        optimizer_s=update,
        samples_per_s=setup.global_batch / step_s,
        tokens_per_s=setup.global_batch * (setup.sequence or 1) / step_s,
        mfu=3 * profile.whole_flops * setup.global_batch / setup.microbatch / (step_s * rate),
    )


def step_seconds(profile: Profile, setup: StepSetup, links: Links) -> float:
    """``predict_step``'s expected seconds alone."""
    return _range_s(_parts(profile, setup, links, stage_times(profile, setup, links)), links)[1]


def least_step_s(profile: Profile, setup: StepSetup, links: Links) -> float:
    """A lower bound of the predicted time: the slowest rank computes all its microbatches, and updates."""
    times = stage_times(profile, setup, links)
    if links.cluster.calibration is not None:
        return _range_s(_least_parts(profile, setup, links, times), links)[1]
    updates = [_update_s(profile, setup, links, s) for s in range(setup.num_stages)]
    busy_s = setup.num_microbatches * _of_busiest_rank(setup, [time.both_s for time in times])
    return _built_in(links).expected * (busy_s + _of_busiest_rank(setup, updates) + links.norm_s())


def stage_times(profile: Profile, setup: StepSetup, links: Links) -> tuple[StageTime, ...]:
    """Seconds of every stage for one microbatch."""
    return tuple(_stage_time(profile, setup, links, stage) for stage in range(setup.num_stages))


def _pipeline_s(setup: StepSetup, times: Sequence[StageTime]) -> float:
    if setup.custom is not None:
        return max(run_pipeline(times, setup.num_microbatches, setup.custom))
    return pipeline_s(setup.schedule, times, setup.mesh.pp, setup.num_microbatches)


def _exposed_s(profile: Profile, setup: StepSetup, links: Links, times: Sequence[StageTime]) -> float:
    """Seconds after the pipeline's end until all gradients are summed: those of later stages are while earlier ones still compute."""
    waits = [_exposed_reduction_s(profile, setup, links, s, times[s]) for s in range(setup.num_stages)]
    if setup.num_stages > setup.mesh.pp or setup.custom is not None:
        return _of_busiest_rank(setup, waits)
    before_s = [
        0.0,
        *accumulate(time.backward_s for time in times[:-1]),
    ]  # from a stage's end to the first one's
    return max(0.0, *(wait - earlier for wait, earlier in zip(waits, before_s, strict=True)))


def _of_busiest_rank(setup: StepSetup, by_stage: Sequence[float]) -> float:
    """The most that the stages of one pipeline rank add up to."""
    return max(_by_rank(setup, by_stage))


def _busiest_rank(setup: StepSetup, by_stage: Sequence[float]) -> int:
    by_rank = _by_rank(setup, by_stage)
    return by_rank.index(max(by_rank))


def _by_rank(setup: StepSetup, by_stage: Sequence[float]) -> list[float]:
    return [sum(by_stage[stage] for stage in setup.stages_of(rank)) for rank in range(setup.mesh.pp)]


def _parts(profile: Profile, setup: StepSetup, links: Links, times: Sequence[StageTime]) -> Parts:
    """Seconds by cause: what no schedule can spare, the reductions that nothing hides, and the pipeline's bubble and transfers."""
    least = _least_parts(profile, setup, links, times)
    update = _of_busiest_rank(setup, [_update_s(profile, setup, links, s) for s in range(setup.num_stages)])
    pipeline = _pipeline_s(setup, times) + update + links.norm_s() - sum(least)
    exposed = _exposed_s(profile, setup, links, times)
    return least._replace(dp=least.dp + exposed, pp=max(0.0, pipeline))


def _least_parts(profile: Profile, setup: StepSetup, links: Links, times: Sequence[StageTime]) -> Parts:
    """Seconds by cause that no schedule can spare: the slowest rank computes all its microbatches, and updates."""
    stages = range(setup.num_stages)
    slowest = _busiest_rank(setup, [time.both_s for time in times])
    busy = Parts()
    for stage in setup.stages_of(slowest):
        computed = compute_parts(_units(profile, setup, stage), setup.recompute_of(stage))
        added_s = _accumulation_s(profile, setup, links, stage)
        waits_s = sum(_waits(profile, setup, links, stage))
        busy = busy.plus(computed._replace(memory=computed.memory + added_s, dp=waits_s))
    updates_s = [_update_s(profile, setup, links, stage) for stage in stages]
    updating = setup.stages_of(_busiest_rank(setup, updates_s))
    gathers_s = sum(_new_parameters_s(profile, setup, links, stage) for stage in updating)
    busy = busy.times(setup.num_microbatches)
    return busy._replace(
        memory=busy.memory + sum(updates_s[stage] for stage in updating) - gathers_s,
        dp=busy.dp + gathers_s + links.norm_s(),
    )


def _range_s(parts: Parts, links: Links) -> tuple[float, float, float]:
    """Low, expected and high seconds: by the cluster's own runs where it was calibrated."""
    if links.cluster.calibration is not None:
        return links.cluster.calibration.range_s(parts._asdict())
    spread = _built_in(links)
    return spread.low * sum(parts), spread.expected * sum(parts), spread.high * sum(parts)


def _built_in(links: Links) -> Spread:
    return CALIBRATIONS.get(links.cluster.device.kind, CALIBRATIONS["cpu"])


def _units(profile: Profile, setup: StepSetup, stage: int) -> list[UnitCost]:
    return [profile.units[index] for index in setup.units_of(stage, profile)]


def _stage_time(profile: Profile, setup: StepSetup, links: Links, stage: int) -> StageTime:
    units = _units(profile, setup, stage)
    forward_s, backward_s = _plain_times(units, setup, stage)
    wait = _waits(profile, setup, links, stage)
    backward_s += _accumulation_s(profile, setup, links, stage)
    receive_s = _transfer_s(setup, links, units[0].input_bytes) if stage else 0.0
    if not setup.execution.overlaps_sends and setup.mesh.pp > 1:
        held_s = max(receive_s, _transfer_s(setup, links, units[0].input_bytes) if stage == 0 else 0.0)
        return StageTime(forward_s + wait[0] + held_s, backward_s + wait[1] + held_s)
    return StageTime(forward_s + wait[0], backward_s + wait[1], receive_s)


def _transfer_s(setup: StepSetup, links: Links, num_bytes: int) -> float:
    """Seconds from one stage to the next; scattered, a tensor-parallel rank sends its part and gathers the others' inside the node."""
    tp = setup.mesh.tp
    if setup.execution.scatters_sends and tp > 1:
        return links.transfer_s(num_bytes // tp) + links.tp_gather_s(num_bytes)
    return links.transfer_s(num_bytes)


def _accumulation_s(profile: Profile, setup: StepSetup, links: Links, stage: int) -> float:
    """Seconds of adding a microbatch's gradients to their sums: nothing to do for a single microbatch."""
    if setup.num_microbatches == 1:
        return 0.0
    elements = stage_elements(profile, setup, stage)
    if setup.sharding_level >= 2:
        elements = setup.part_elements(elements, _expert_elements(profile, setup, stage))
    return moved_s(elements * setup.accumulation_bytes, links.cluster.device)


def _plain_times(units: Sequence[UnitCost], setup: StepSetup, stage: int) -> tuple[float, float]:
    """Seconds forward and backward of compute, talk that nothing hides, and recomputation."""
    recompute = setup.recompute_of(stage)
    forward_s = sum(unit.forward_s + unit.talk_s(forward=True) for unit in units)
    backward_s = sum(
        unit.backward_s + unit.talk_s(forward=False) + unit.kept[recompute].recompute_s for unit in units
    )
    return forward_s, backward_s


def _waits(profile: Profile, setup: StepSetup, links: Links, stage: int) -> tuple[float, float]:
    """Seconds forward and backward that a microbatch waits for ZeRO-2/3: the first gather, the last reduction, what does not hide."""
    if setup.sharding_level < 2:
        return 0.0, 0.0
    units = _units(profile, setup, stage)
    forward_s, backward_s = _plain_times(units, setup, stage)
    how = setup.execution
    calls = [(unit, min(unit.num_parameters, how.gathers_apart) or 1) for unit in units]
    gathers = [links.shards_s("all_gather", u.own_elements * setup.compute_bytes, num) for u, num in calls]
    sums = [_scatter_s(links, unit.own_elements * setup.wire_bytes, num) for unit, num in calls]
    again = _times_gathered_again(setup, stage)
    is_ahead = all(unit.own_elements < num * how.live_elements for unit, num in calls)
    slowdown = links.overlap_slowdown if is_ahead else 1.0
    copies_s = 0.0
    if how.gathers_apart:
        copies_s = sum(num for _, num in calls) * setup.num_shards * dispatch_s(links.cluster.device)
    return (
        copies_s + exposed_s(sum(gathers), forward_s, slowdown, gathers[0]),
        (again + 1) * copies_s + exposed_s(again * sum(gathers) + sum(sums), backward_s, slowdown, sums[0]),
    )


def _times_gathered_again(setup: StepSetup, stage: int) -> int:
    """For the backward under ZeRO-3, and where parameters travel apart for recomputing before it."""
    if setup.sharding_level < 3:
        return 0
    return 2 if setup.execution.gathers_apart and setup.recompute_of(stage) != "none" else 1


def _exposed_reduction_s(
    profile: Profile, setup: StepSetup, links: Links, stage: int, time: StageTime
) -> float:
    """Seconds after the last backward until a stage's gradients are summed over dp and ties."""
    waited = links.tie_s(_tied_elements(profile, setup, stage) * setup.wire_bytes)
    if setup.mesh.num_replicas == 1 or setup.sharding_level >= 2:
        return waited
    elements = stage_elements(profile, setup, stage)
    num_buckets = _num_buckets(setup, elements)
    num_bytes = elements * setup.wire_bytes
    waited += moved_s(elements * setup.execution.packing_bytes, links.cluster.device)
    if setup.sharding_level and not setup.execution.sums_whole:
        all_s = _scatter_s(links, num_bytes, num_buckets)
    else:
        all_s = links.dp_s("all_reduce", num_bytes, num_buckets)
    if not setup.execution.overlaps_gradients:
        return waited + all_s
    return waited + exposed_s(all_s, time.backward_s, links.overlap_slowdown, all_s / num_buckets)


def _scatter_s(links: Links, num_bytes: float, num_calls: int = 1) -> float:
    """Seconds until gradients are summed and cut among the ranks that ZeRO cuts over, and summed with those of its copies."""
    return links.shards_s("reduce_scatter", num_bytes, num_calls) + links.copies_s(num_bytes, num_calls)


def _expert_elements(profile: Profile, setup: StepSetup, stage: int) -> int:
    return sum(unit.expert_elements for unit in _units(profile, setup, stage))


def _tied_elements(profile: Profile, setup: StepSetup, stage: int) -> int:
    """Elements of the parameters that this stage shares with another."""
    own = {name for unit in _units(profile, setup, stage) for name in unit.shared}
    if not own:
        return 0
    inside = setup.units_of(stage, profile)
    others = {name for i, unit in enumerate(profile.units) if i not in inside for name in unit.shared}
    return sum(profile.shared_elements[name] for name in own & others)


def _update_s(profile: Profile, setup: StepSetup, links: Links, stage: int) -> float:
    """The optimizer over what a rank owns, and under ZeRO-1 the gather of the new parameters."""
    elements = stage_elements(profile, setup, stage)
    own = setup.part_elements(elements, _expert_elements(profile, setup, stage))
    num_tensors = _num_buckets(setup, elements)
    if setup.sharding_level >= 2:
        num_tensors = sum(unit.num_parameters for unit in _units(profile, setup, stage))
    step_s = optimizer_s(own, setup.master_bytes, num_tensors, links.cluster.device)
    if setup.is_offloaded:
        step_s = offloaded_update_s(
            own,
            links.cluster.device,
            down_bytes=setup.gradient_bytes,
            up_bytes=setup.stored_bytes,
            element_bytes=setup.master_bytes,
        )
    if setup.execution.update_bytes is not None:
        step_s = moved_s(own * setup.execution.update_bytes, links.cluster.device)
    return step_s + _new_parameters_s(profile, setup, links, stage)


def _new_parameters_s(profile: Profile, setup: StepSetup, links: Links, stage: int) -> float:
    """The gather of the new parameters under ZeRO-1."""
    if setup.sharding_level != 1:
        return 0.0
    elements = stage_elements(profile, setup, stage)
    num_bytes = elements * setup.compute_bytes
    if setup.execution.broadcasts_parameters:
        return links.shards_s("broadcast", num_bytes, setup.num_shards)
    return links.shards_s("all_gather", num_bytes, _num_buckets(setup, elements))


def _num_buckets(setup: StepSetup, elements: int) -> int:
    return max(1, -(-elements * setup.compute_bytes // setup.bucket_bytes))


def _stages(profile: Profile, setup: StepSetup, times: Sequence[StageTime]) -> tuple[StagePrediction, ...]:
    compute = [
        sum(unit.forward_s + unit.backward_s for unit in _units(profile, setup, s))
        for s in range(setup.num_stages)
    ]
    return tuple(
        StagePrediction(
            forward_s=time.forward_s,
            backward_s=time.backward_s,
            compute_ratio=compute[stage] / sum(compute),
            num_elements=stage_elements(profile, setup, stage),
            memory=stage_memory(profile, setup, stage),
        )
        for stage, time in enumerate(times)
    )
