"""``predict_step``: how long a step takes, and what each rank holds.

    step = first gather + pipeline + exposed reduction of gradients + optimizer + the norm's sum

    pipeline   the schedule's formula over the stages' forward and backward seconds (``pipeline_s``)
    forward    Σ units: kernels, or their launches where the host is slower, and talk along tp, which nothing hides
    backward   the same, what is recomputed, and adding a microbatch's gradients to their sums
    exposed    what of the gradients' reduction the last backward does not hide; its last bucket never is
    ZeRO-2     a gather of all parameters as the step begins, beside nothing but what later stages wait for anyway
    ZeRO-2/3   reductions of every microbatch, hidden by compute but for the last; under ZeRO-3 gathers, but for the first unit's

How much hides under compute is the device's (``links.exposed_s``), and whether the framework lets it (``Execution``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from types import MappingProxyType
from typing import Final, NamedTuple

from shardstage.cost.links import Links
from shardstage.cost.memory import MemoryModel, MemoryUse
from shardstage.cost.parts import Parts
from shardstage.cost.pipeline import (
    StageTime,
    bubble_s,
    exposed_talk_s,
    idle_cores_s,
    mean_stage,
    pipeline_s,
    run_pipeline,
)
from shardstage.cost.profile import Profile
from shardstage.cost.setup import StepSetup
from shardstage.cost.stages import StageCost, stage_costs

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
    profile: Profile, setup: StepSetup, links: Links, memory: MemoryModel | None = None
) -> Prediction:
    """Seconds and bytes of one step on the links' cluster; ``memory`` of the same setup, where it was asked already."""
    memory = memory or MemoryModel(profile, setup)
    cluster = links.cluster
    stages = stage_costs(profile, setup, links)
    times = [stage.time for stage in stages]
    m, num_ranks = setup.num_microbatches, setup.mesh.pp
    end_s = _pipeline_s(setup, links, stages)
    travel_s = end_s - _pipeline_s(setup, links, [stage.without_travel() for stage in stages])
    exposed = _exposed_s(setup, stages)
    parts = _parts(setup, links, stages)
    low_s, step_s, high_s = _range_s(parts, links)
    busy = [m * time.both_s for time in times]
    rate = cluster.device.rate(setup.precision) * setup.mesh.world_size
    return Prediction(
        step_time_s=step_s,
        step_time_low_s=low_s,
        step_time_high_s=high_s,
        parts=parts._asdict(),
        stages=_stages(memory, stages),
        ranks=tuple(map(memory.rank, range(num_ranks))),
        bubble_ratio=1 - sum(busy) / (num_ranks * end_s),
        exposed_dp_s=_unshard_s(setup, stages)
        + exposed
        + m * _of_busiest_rank(setup, [stage.waits_s for stage in stages]),
        exposed_tp_s=_of_busiest_rank(setup, [m * stage.talk_s for stage in stages]),
        exposed_pp_s=travel_s,
        optimizer_s=_of_busiest_rank(setup, [stage.update_s for stage in stages]),
        samples_per_s=setup.global_batch / step_s,
        tokens_per_s=setup.global_batch * (setup.sequence or 1) / step_s,
        mfu=3 * profile.whole_flops * setup.global_batch / setup.microbatch / (step_s * rate),
    )


def step_seconds(profile: Profile, setup: StepSetup, links: Links) -> float:
    """``predict_step``'s expected seconds alone."""
    return _range_s(_parts(setup, links, stage_costs(profile, setup, links)), links)[1]


def least_step_s(profile: Profile, setup: StepSetup, links: Links) -> float:
    """A lower bound of the predicted time: the slowest rank computes all its microbatches, and updates."""
    stages = stage_costs(profile, setup, links)
    if links.cluster.calibration is not None:
        return _range_s(_least_parts(setup, links, stages), links)[1]
    update_s = _of_busiest_rank(setup, [stage.update_s for stage in stages])
    return _built_in(links).expected * (_busy_s(setup, links, stages) + update_s + links.norm_s())


def stage_times(profile: Profile, setup: StepSetup, links: Links) -> tuple[StageTime, ...]:
    """Seconds of every stage for one microbatch."""
    return tuple(stage.time for stage in stage_costs(profile, setup, links))


def _pipeline_s(setup: StepSetup, links: Links, stages: Sequence[StageCost]) -> float:
    """Until the last backward; ranks that share cores compute quicker while others wait, but never all of them.

    Nobody computes while the first microbatch travels on, nor while the last one's gradient travels back.
    """
    alone = [stage.alone for stage in stages]
    if setup.custom is not None:
        alone_s = max(run_pipeline(alone, setup.num_microbatches, setup.custom))
    else:
        alone_s = pipeline_s(setup.schedule, alone, setup.mesh.pp, setup.num_microbatches)
    if links.cluster.device.alone_ratio == 1:
        return alone_s
    p = setup.mesh.pp
    ends_s = [2 * stage.message_s / links.alone_ratio for stage in stages]  # work, and in receive_s
    travel_s = 2 * sum(
        max(0.0, stage.receive_s - own_s) for stage, own_s in zip(alone[1:p], ends_s[1:p], strict=True)
    )
    return max(alone_s, _together_s(setup, links, stages) + _messages_s(setup, stages) + travel_s)


def _together_s(setup: StepSetup, links: Links, stages: Sequence[StageCost]) -> float:
    """Of a pipeline on cores that its ranks share: what all of them compute, and what cores idle as it fills and drains or ranks talk."""
    shared_s, p, m = _shared_s(setup, links, stages), setup.mesh.pp, setup.num_microbatches
    if p == 1:
        return shared_s
    alone, num_cores = [stage.alone for stage in stages], p / links.cluster.device.alone_ratio
    talks = [_talk(stage, links.alone_ratio) for stage in stages]
    compute = [_without(stage, talk) for stage, talk in zip(alone, talks, strict=True)]
    talk_s = sum(talk.both_s for talk in talks) / p
    compute_s = shared_s - m * talk_s
    exposed_s = exposed_talk_s(talk_s, _mean_bubble_s(setup, talks), compute_s / m / p, p, m)
    return max(
        shared_s + idle_cores_s(_mean_bubble_s(setup, alone), p, num_cores),
        compute_s + idle_cores_s(_mean_bubble_s(setup, compute), p, num_cores) + exposed_s,
    )


def _mean_bubble_s(setup: StepSetup, stages: Sequence[StageTime]) -> float:
    """Of stages that all take what these do in the mean."""
    p, m = setup.mesh.pp, setup.num_microbatches
    mean = [mean_stage(stages)._replace(receive_s=0.0)] * len(stages)
    if setup.custom is None:
        return bubble_s(setup.schedule, mean, p, m)
    return max(run_pipeline(mean, m, setup.custom)) - m * len(stages) / p * mean[0].both_s


def _talk(stage: StageCost, ratio: float) -> StageTime:
    """What a stage waits for others in a microbatch: what is no quicker where compute is so many times quicker."""
    time, alone = stage.time, stage.alone
    forward_s = (ratio * alone.forward_s - time.forward_s) / (ratio - 1)
    backward_s = (ratio * alone.backward_s - time.backward_s) / (ratio - 1)
    return StageTime(max(0.0, forward_s), max(0.0, backward_s))


def _without(stage: StageTime, talk: StageTime) -> StageTime:
    return StageTime(
        stage.forward_s - talk.forward_s, stage.backward_s - talk.backward_s, weight_s=stage.weight_s
    )


def _messages_s(setup: StepSetup, stages: Sequence[StageCost]) -> float:
    """What messages between stages take of shared cores: each microbatch's two are sent by one rank and received by another."""
    return 4 * setup.num_microbatches * sum(stage.message_s for stage in stages) / setup.mesh.pp


def _shared_s(setup: StepSetup, links: Links, stages: Sequence[StageCost]) -> float:
    """What all ranks together have to compute on the cores that they share; 0 where each has its device."""
    if links.cluster.device.alone_ratio == 1:
        return 0.0
    return setup.num_microbatches * sum(stage.time.both_s for stage in stages) / setup.mesh.pp


def _busy_s(setup: StepSetup, links: Links, stages: Sequence[StageCost]) -> float:
    """What no schedule can spare: the slowest rank computes all its microbatches."""
    slowest_s = setup.num_microbatches * _of_busiest_rank(setup, [stage.alone.both_s for stage in stages])
    return max(slowest_s, _shared_s(setup, links, stages))


def _exposed_s(setup: StepSetup, stages: Sequence[StageCost]) -> float:
    """Seconds after the pipeline's end until all gradients are summed: those of later stages are while earlier ones still compute."""
    waits = [stage.reduction_s for stage in stages]
    if setup.num_stages > setup.mesh.pp or setup.custom is not None:
        return _of_busiest_rank(setup, waits)
    # from a stage's end to the first one's
    before_s = [0.0, *accumulate(stage.time.backward_s for stage in stages[:-1])]
    return max(0.0, *(wait - earlier for wait, earlier in zip(waits, before_s, strict=True)))


def _unshard_s(setup: StepSetup, stages: Sequence[StageCost]) -> float:
    """Seconds that the first microbatch is late as ranks first gather what stays whole: those of later stages do while it is on its way."""
    before_s = [0.0, *accumulate(stage.alone.forward_s for stage in stages[:-1])]
    gathers_s = _by_rank(setup, [stage.unshard_s for stage in stages])
    return max(seconds - before_s[min(setup.stages_of(rank))] for rank, seconds in enumerate(gathers_s))


def _of_busiest_rank(setup: StepSetup, by_stage: Sequence[float]) -> float:
    """The most that the stages of one pipeline rank add up to."""
    return max(_by_rank(setup, by_stage))


def _busiest_rank(setup: StepSetup, by_stage: Sequence[float]) -> int:
    by_rank = _by_rank(setup, by_stage)
    return by_rank.index(max(by_rank))


def _by_rank(setup: StepSetup, by_stage: Sequence[float]) -> list[float]:
    return [sum(by_stage[stage] for stage in setup.stages_of(rank)) for rank in range(setup.mesh.pp)]


def _parts(setup: StepSetup, links: Links, stages: Sequence[StageCost]) -> Parts:
    """Seconds by cause: what no schedule can spare, gathers and reductions that nothing hides, and the pipeline's bubble and transfers."""
    least = _least_parts(setup, links, stages)
    update = _of_busiest_rank(setup, [stage.update_s for stage in stages])
    end_s = _pipeline_s(setup, links, stages)
    return least._replace(
        dp=least.dp + _unshard_s(setup, stages) + _exposed_s(setup, stages),
        pp=max(0.0, end_s + update + links.norm_s() - sum(least)),
    )


def _least_parts(setup: StepSetup, links: Links, stages: Sequence[StageCost]) -> Parts:
    """Seconds by cause that no schedule can spare: the slowest rank computes all its microbatches, and updates."""
    slowest = _busiest_rank(setup, [stage.time.both_s for stage in stages])
    busy = Parts()
    for number in setup.stages_of(slowest):
        busy = busy.plus(stages[number].parts)
    updating = setup.stages_of(_busiest_rank(setup, [stage.update_s for stage in stages]))
    gathers_s = sum(stages[number].gather_s for number in updating)
    busy = busy.times(setup.num_microbatches)
    if links.cluster.device.alone_ratio > 1:
        busy = busy.times(_busy_s(setup, links, stages) / sum(busy))
    return busy._replace(
        memory=busy.memory + sum(stages[number].update_s for number in updating) - gathers_s,
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


def _stages(memory: MemoryModel, stages: Sequence[StageCost]) -> tuple[StagePrediction, ...]:
    compute_s = sum(stage.compute_s for stage in stages)
    return tuple(
        StagePrediction(
            forward_s=stage.time.forward_s,
            backward_s=stage.time.backward_s,
            compute_ratio=stage.compute_s / compute_s,
            num_elements=stage.num_elements,
            memory=memory.stage(number),
        )
        for number, stage in enumerate(stages)
    )
