"""``predict_step``: a first, analytic model of how long a step takes.

    step = calibration × ( max over stages ( end of its last backward + exposed reduction of its gradients ) + optimizer )

    end        the pipeline's recurrence over the stages' forward and backward seconds (``run_pipeline``)
    forward    Σ units: compute + talk along tp, which nothing hides
    backward   the same, and what is recomputed
    exposed    what of the gradients' reduction the last backward does not hide; its last bucket never is
    ZeRO-2/3   gathers and reductions of every microbatch, hidden by compute but for the first and the last unit

How much hides under compute is the device's (``Links.hidden_ratio``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, NamedTuple

from shardstage.cluster import CollectiveKind
from shardstage.cost.compute import optimizer_s
from shardstage.cost.links import Links
from shardstage.cost.memory import MemoryUse, rank_memory, stage_elements, stage_memory
from shardstage.cost.pipeline import StageTime, least_pipeline_s, run_pipeline
from shardstage.cost.profile import Profile, UnitCost
from shardstage.cost.setup import StepSetup

__all__ = ["Prediction", "StagePrediction", "least_step_s", "predict_step", "stage_times"]


class Calibration(NamedTuple):
    """Measured over modelled step time: 10th percentile, median, 90th percentile."""

    low: float
    expected: float
    high: float


CALIBRATIONS: Final = MappingProxyType(
    {"cuda": Calibration(0.97, 1.14, 1.61), "cpu": Calibration(0.8, 1.0, 1.5)}
)
"""What the formulas leave out, by kind of device. cuda: 489 published runs in 11 groups (benchmarks/prediction_sanity; ``expected`` is
the median of the groups' medians). cpu: our estimate, for want of published runs."""


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

    ``exposed_*_s`` are seconds of the slowest stage that wait for an axis, ``bubble_ratio`` is the share of the pipeline's time in
    which the average stage idles. ``mfu`` counts three forwards a sample (Chowdhery et al., "PaLM", 2022, appendix B), attention in
    full, over the device's best rate.
    """

    step_time_s: float
    step_time_low_s: float
    step_time_high_s: float
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


def predict_step(profile: Profile, setup: StepSetup, links: Links) -> Prediction:
    """Seconds and bytes of one step on the links' cluster."""
    cluster = links.cluster
    times = stage_times(profile, setup, links)
    m, num_stages, num_ranks = setup.num_microbatches, setup.num_stages, setup.mesh.pp
    order = setup.custom or setup.schedule
    ends = run_pipeline(times, m, order, num_ranks=num_ranks)
    instant = run_pipeline([t._replace(receive_s=0.0) for t in times], m, order, num_ranks=num_ranks)
    exposed = [_exposed_reduction_s(profile, setup, links, s, times[s]) for s in range(num_stages)]
    update = _of_busiest_rank(setup, [_update_s(profile, setup, links, s) for s in range(num_stages)])
    backward_done = max(end + wait for end, wait in zip(ends, exposed, strict=True))
    modelled_s = backward_done + update + links.norm_s()
    calibration = _calibration(links)
    step_s = calibration.expected * modelled_s
    busy = [m * (time.forward_s + time.backward_s) for time in times]
    talk = [
        m * sum(u.tp_forward_s + u.tp_backward_s for u in _units(profile, setup, s))
        for s in range(num_stages)
    ]
    gathering = [
        time.forward_s + time.backward_s - sum(_plain_times(_units(profile, setup, s), setup))
        for s, time in enumerate(times)
    ]
    rate = cluster.device.rate(setup.precision) * setup.mesh.world_size
    return Prediction(
        step_time_s=step_s,
        step_time_low_s=calibration.low * modelled_s,
        step_time_high_s=calibration.high * modelled_s,
        stages=_stages(profile, setup, times),
        ranks=tuple(rank_memory(profile, setup, rank) for rank in range(num_ranks)),
        bubble_ratio=1 - sum(busy) / (num_ranks * max(ends)),
        exposed_dp_s=backward_done - max(ends) + m * _of_busiest_rank(setup, gathering),
        exposed_tp_s=_of_busiest_rank(setup, talk),
        exposed_pp_s=max(ends) - max(instant),
        optimizer_s=update,
        samples_per_s=setup.global_batch / step_s,
        tokens_per_s=setup.global_batch * (setup.sequence or 1) / step_s,
        mfu=3 * profile.whole_flops * setup.global_batch / setup.microbatch / (step_s * rate),
    )


def least_step_s(profile: Profile, setup: StepSetup, links: Links) -> float:
    """A lower bound of the predicted time, without running the schedule."""
    times = stage_times(profile, setup, links)
    updates = [_update_s(profile, setup, links, s) for s in range(setup.num_stages)]
    update = _of_busiest_rank(setup, updates)
    pipeline_s = least_pipeline_s(times, setup.num_microbatches)
    return _calibration(links).expected * (pipeline_s + update + links.norm_s())


def stage_times(profile: Profile, setup: StepSetup, links: Links) -> tuple[StageTime, ...]:
    """Seconds of every stage for one microbatch."""
    return tuple(_stage_time(profile, setup, links, stage) for stage in range(setup.num_stages))


def _of_busiest_rank(setup: StepSetup, by_stage: Sequence[float]) -> float:
    """The most that the stages of one pipeline rank add up to."""
    return max(sum(by_stage[stage] for stage in setup.stages_of(rank)) for rank in range(setup.mesh.pp))


def _calibration(links: Links) -> Calibration:
    return CALIBRATIONS.get(links.cluster.device.kind, CALIBRATIONS["cpu"])


def _units(profile: Profile, setup: StepSetup, stage: int) -> list[UnitCost]:
    return [profile.units[index] for index in setup.units_of(stage, profile)]


def _stage_time(profile: Profile, setup: StepSetup, links: Links, stage: int) -> StageTime:
    units = _units(profile, setup, stage)
    forward_s, backward_s = _plain_times(units, setup)
    wait = _gathering_waits(units, setup, links, forward_s, backward_s)
    receive_s = links.transfer_s(units[0].input_bytes) if stage else 0.0
    return StageTime(forward_s + wait[0], backward_s + wait[1], receive_s)


def _plain_times(units: Sequence[UnitCost], setup: StepSetup) -> tuple[float, float]:
    """Seconds forward and backward of compute, talk along tp and recomputation."""
    forward_s = sum(unit.forward_s + unit.tp_forward_s for unit in units)
    backward_s = sum(
        unit.backward_s + unit.tp_backward_s + unit.kept[setup.recompute].recompute_s for unit in units
    )
    return forward_s, backward_s


def _gathering_waits(
    units: Sequence[UnitCost], setup: StepSetup, links: Links, forward_s: float, backward_s: float
) -> tuple[float, float]:
    """Seconds forward and backward that a microbatch waits for ZeRO-2/3: the first gather, the last reduction, what does not hide."""
    if setup.sharding_level < 2:
        return 0.0, 0.0
    gathers = [links.dp_s("all_gather", unit.own_elements * setup.compute_bytes) for unit in units]
    sums = [links.dp_s("reduce_scatter", unit.own_elements * setup.master_bytes) for unit in units]
    again = gathers if setup.sharding_level == 3 else []
    return (
        max(gathers[0], sum(gathers) - links.hidden_ratio * forward_s),
        max(sums[0], sum(again) + sum(sums) - links.hidden_ratio * backward_s),
    )


def _exposed_reduction_s(
    profile: Profile, setup: StepSetup, links: Links, stage: int, time: StageTime
) -> float:
    """Seconds after the last backward until a stage's gradients are summed over dp and ties."""
    waited = links.tie_s(_tied_elements(profile, setup, stage) * setup.master_bytes)
    if setup.mesh.dp == 1 or setup.sharding_level >= 2:
        return waited
    elements = stage_elements(profile, setup, stage)
    kind: CollectiveKind = "reduce_scatter" if setup.sharding_level else "all_reduce"
    num_buckets = max(1, -(-elements * setup.compute_bytes // setup.bucket_bytes))
    all_s = links.dp_s(kind, elements * setup.master_bytes, num_buckets)
    return waited + max(all_s / num_buckets, all_s - links.hidden_ratio * time.backward_s)


def _tied_elements(profile: Profile, setup: StepSetup, stage: int) -> int:
    """Elements of the parameters that this stage shares with another."""
    names = [{n for unit in _units(profile, setup, s) for n in unit.shared} for s in range(setup.num_stages)]
    others = set().union(*(found for s, found in enumerate(names) if s != stage))
    return sum(profile.shared_elements[name] for name in names[stage] & others)


def _update_s(profile: Profile, setup: StepSetup, links: Links, stage: int) -> float:
    """The optimizer over what a rank owns, and under ZeRO-1 the gather of the new parameters."""
    elements = stage_elements(profile, setup, stage)
    own = elements // (setup.mesh.dp if setup.sharding_level else 1)
    num_buckets = max(1, -(-elements * setup.compute_bytes // setup.bucket_bytes))
    num_tensors = num_buckets
    if setup.sharding_level >= 2:
        num_tensors = sum(unit.num_parameters for unit in _units(profile, setup, stage))
    step_s = optimizer_s(own, setup.master_bytes, num_tensors, links.cluster.device)
    if setup.sharding_level == 1:
        step_s += links.dp_s("all_gather", elements * setup.compute_bytes, num_buckets)
    return step_s


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
