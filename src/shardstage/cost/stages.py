"""``stage_costs``: what each stage of a pipeline takes for one microbatch, and once a step; stages of equal units are priced once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import mul
from typing import NamedTuple

from shardstage.cost.compute import dispatch_s, moved_s, optimizer_s
from shardstage.cost.links import Links, Replicas, exposed_s
from shardstage.cost.memory import stage_elements
from shardstage.cost.offload import offloaded_update_s
from shardstage.cost.parts import Parts, compute_parts
from shardstage.cost.pipeline import StageTime
from shardstage.cost.profile import Profile, UnitCost
from shardstage.cost.setup import StepSetup
from shardstage.graph.recompute import Recompute, StageRecompute

__all__ = [
    "Gathered",
    "StageCost",
    "least_reduction_s",
    "least_update_s",
    "run_cost",
    "stage_costs",
    "zero_talk_s",
]


class Gathered(NamedTuple):
    """Elements that ZeRO-2/3 gathers, and whose gradients it sums, in so many calls; ``experts`` of them are of experts."""

    elements: float
    experts: float = 0.0
    calls: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class StageCost:
    """Of one stage: ``time`` and its ``parts`` for a microbatch (``alone`` while no other stage computes on its cores).

    ``message_s`` is what one message into it takes of cores that ranks share. ``waits_s`` of ``time`` are for ZeRO-2/3, ``compute_s`` and
    ``talk_s`` plain compute and talk along tp.
    Once a step: ``unshard_s`` gathers what stays whole through it under ZeRO-2/3, ``update_s`` is the optimizer and the gather of the new
    parameters under ZeRO-1 (``gather_s`` of it), ``reduction_s`` what of the gradients' sums the last backward does not hide.
    """

    num_elements: int
    time: StageTime
    alone: StageTime
    parts: Parts
    message_s: float
    waits_s: float
    compute_s: float
    talk_s: float
    unshard_s: float
    update_s: float
    gather_s: float
    reduction_s: float

    def without_travel(self) -> StageCost:
        """The same next to the stage before it."""
        return replace(self, time=self.time._replace(receive_s=0.0), alone=self.alone._replace(receive_s=0.0))


def stage_costs(profile: Profile, setup: StepSetup, links: Links) -> tuple[StageCost, ...]:
    """Of all stages, in order."""
    known: dict[tuple[object, ...], StageCost] = {}
    found = []
    for stage in range(setup.num_stages):
        units = [profile.units[index] for index in setup.units_of(stage, profile)]
        has_ties = any(unit.shared for unit in units)
        key = (*map(id, units), *setup.modes_of(stage, profile), stage == 0, stage if has_ties else -1)
        if key not in known:
            known[key] = _stage_cost(profile, setup, links, stage, units)
        found.append(known[key])
    return tuple(found)


def run_cost(
    profile: Profile,
    setup: StepSetup,
    links: Links,
    stage: int,
    units: range,
    recompute: StageRecompute,
) -> StageCost:
    """Of a stage of these units, wherever the others are cut: there are as many units as stages before and after it, at least."""
    after = range(units.stop, units.stop + setup.num_stages - stage - 1)
    alone = replace(
        setup, starts=(*range(stage), units.start, *after), recompute=recompute, recompute_of_stages=()
    )
    return _stage_cost(profile, alone, links, stage, profile.units[units.start : units.stop])


def _stage_cost(
    profile: Profile, setup: StepSetup, links: Links, stage: int, units: Sequence[UnitCost]
) -> StageCost:
    elements = stage_elements(profile, setup, stage)
    experts = sum(unit.expert_elements for unit in units)
    part = setup.part_elements(elements, experts)
    modes = setup.modes_of(stage, profile)
    plain = _plain_times(units, modes)
    unshard_s, waits = _zero_s(profile, units, modes, plain, setup, links)
    added_s = _accumulation_s(elements, part, setup, links)
    time = _time(units, plain, waits, added_s, setup, links, stage)
    gather_s = _new_parameters_s(elements, experts, setup, links)
    parts = compute_parts(units, modes)
    return StageCost(
        num_elements=elements,
        time=time,
        alone=_alone(units, time, waits, links),
        parts=parts._replace(memory=parts.memory + added_s, dp=sum(waits)),
        message_s=links.message_s(units[0].input_bytes) if stage else 0.0,
        waits_s=sum(waits),
        compute_s=sum(unit.forward_s + unit.backward_s for unit in units),
        talk_s=sum(unit.tp_forward_s + unit.tp_backward_s for unit in units),
        unshard_s=unshard_s,
        update_s=_optimizer_s(units, elements, part, setup, links) + gather_s,
        gather_s=gather_s,
        reduction_s=_reduction_s(
            elements, experts, _tied_elements(profile, setup, stage, units), time, setup, links
        ),
    )


def _time(
    units: Sequence[UnitCost],
    plain: tuple[float, float],
    waits: tuple[float, float],
    added_s: float,
    setup: StepSetup,
    links: Links,
    stage: int,
) -> StageTime:
    forward_s, backward_s = plain[0], plain[1] + added_s
    weight_s = added_s + sum(unit.weight_s for unit in units)
    receive_s = _transfer_s(setup, links, units[0].input_bytes) if stage else 0.0
    if not setup.execution.overlaps_sends and setup.mesh.pp > 1:
        held_s = max(receive_s, _transfer_s(setup, links, units[0].input_bytes) if stage == 0 else 0.0)
        return StageTime(forward_s + waits[0] + held_s, backward_s + waits[1] + held_s, weight_s=weight_s)
    return StageTime(forward_s + waits[0], backward_s + waits[1], receive_s, weight_s)


def _alone(units: Sequence[UnitCost], time: StageTime, waits: tuple[float, float], links: Links) -> StageTime:
    """The same where compute is as quick as while other stages wait; talk is not."""
    ratio = links.alone_ratio
    if ratio == 1:
        return time
    forward_s, backward_s = (
        sum(unit.talk_s(forward=way) for unit in units) + wait
        for way, wait in zip((True, False), waits, strict=True)
    )
    return time._replace(
        forward_s=forward_s + (time.forward_s - forward_s) / ratio,
        backward_s=backward_s + (time.backward_s - backward_s) / ratio,
        weight_s=time.weight_s / ratio,
    )


def _transfer_s(setup: StepSetup, links: Links, num_bytes: int) -> float:
    """Seconds from one stage to the next; scattered, a tensor-parallel rank sends its part and gathers the others' inside the node."""
    tp = setup.mesh.tp
    if setup.execution.scatters_sends and tp > 1:
        return links.transfer_s(num_bytes // tp) + links.tp_gather_s(num_bytes)
    return links.transfer_s(num_bytes)


def _accumulation_s(elements: int, part: int, setup: StepSetup, links: Links) -> float:
    """Seconds of adding a microbatch's gradients to their sums: nothing to do for a single microbatch."""
    if setup.num_microbatches == 1:
        return 0.0
    summed = part if setup.sharding_level >= 2 else elements
    return moved_s(summed * setup.accumulation_bytes, links.cluster.device)


def _plain_times(units: Sequence[UnitCost], modes: Sequence[Recompute]) -> tuple[float, float]:
    """Seconds forward and backward of compute, talk that nothing hides, and recomputation."""
    forward_s = sum(unit.forward_s + unit.talk_s(forward=True) for unit in units)
    backward_s = sum(
        unit.backward_s + unit.talk_s(forward=False) + unit.kept[mode].recompute_s
        for unit, mode in zip(units, modes, strict=True)
    )
    return forward_s, backward_s


def _zero_s(
    profile: Profile,
    units: Sequence[UnitCost],
    modes: Sequence[Recompute],
    plain: tuple[float, float],
    setup: StepSetup,
    links: Links,
) -> tuple[float, tuple[float, float]]:
    """Seconds of ZeRO-2/3: of gathering what stays whole, as a step begins, beside nothing; and that a microbatch waits, forward and
    backward, for the first gather, the last reduction, and what does not hide."""
    if setup.sharding_level < 2:
        return 0.0, (0.0, 0.0)
    how = setup.execution
    several, own = _gathered(profile, units)
    gathered = [
        Gathered(elements, unit.expert_elements, min(unit.num_parameters, how.gathers_apart) or 1)
        for unit, elements in zip(units, own, strict=True)
    ]
    gathers, sums = zero_talk_s(gathered, setup, links)
    ((unshard_s,), (last_s,)) = zero_talk_s([Gathered(several)], setup, links)
    backward_s = plain[1]
    if setup.sharding_level == 2:
        waits_s = exposed_s(sum(sums) + last_s, backward_s, links.overlap_slowdown, sums[0] + last_s)
        return unshard_s + sum(gathers), (0.0, waits_s)
    times_again = [_times_gathered_again(setup, mode) for mode in modes]
    again_s = sum(map(mul, times_again, gathers))
    is_ahead = all(of.elements < of.calls * how.live_elements for of in gathered)
    slowdown = links.overlap_slowdown if is_ahead else 1.0
    copies_s, copied_again = 0.0, 0.0
    if how.gathers_apart:
        counts = [of.calls for of in gathered]
        copies_s = sum(counts) * setup.num_shards * dispatch_s(links.cluster.device)
        copied_again = sum(map(mul, times_again, counts)) / sum(counts)
    return unshard_s, (
        copies_s + exposed_s(sum(gathers), plain[0], slowdown, next(filter(None, gathers), 0.0)),
        (copied_again + 1) * copies_s
        + exposed_s(again_s + sum(sums) + last_s, backward_s, slowdown, sums[0] + last_s),
    )


def _gathered(profile: Profile, units: Sequence[UnitCost]) -> tuple[int, list[int]]:
    """Elements that ZeRO-2/3 gathers for a whole stage, as several of its units use them, and with each of its units."""
    uses = Counter(name for unit in units for name in unit.shared)
    several = sum(profile.shared_elements[name] for name, number in uses.items() if number > 1)
    return several, [
        unit.own_elements + sum(profile.shared_elements[name] for name in unit.shared if uses[name] == 1)
        for unit in units
    ]


def _times_gathered_again(setup: StepSetup, mode: Recompute) -> int:
    """For a unit's backward under ZeRO-3, and where parameters travel apart for recomputing before it."""
    return 2 if setup.execution.gathers_apart and mode != "none" else 1


def zero_talk_s(
    gathered: Sequence[Gathered], setup: StepSetup, links: Links
) -> tuple[list[float], list[float]]:
    """Seconds of each one's gather under ZeRO-2/3, and of the sum of its gradients."""

    def each(talk_s: Callable[[Replicas, float, int], float], element_bytes: float) -> list[float]:
        def seconds(of: Gathered) -> float:
            return _of_holders(
                of.elements,
                of.experts,
                links,
                lambda holders, elements: talk_s(holders, elements * element_bytes, of.calls),
            )

        known = {of: seconds(of) for of in {*gathered}}
        return [known[of] for of in gathered]

    gathers = each(lambda of, num_bytes, num: of.shards_s("all_gather", num_bytes, num), setup.compute_bytes)
    return gathers, each(Replicas.scatter_s, setup.wire_bytes)


def _of_holders(
    elements: float, experts: float, links: Links, talk_s: Callable[[Replicas, float], float]
) -> float:
    """Seconds of talk among the ranks that hold the same parameters: others hold the same experts where these are dealt out."""
    if not links.deals_out_experts:
        return talk_s(links.replicas, elements)
    return talk_s(links.replicas, elements - experts) + talk_s(links.expert_replicas, experts)


def _reduction_s(
    elements: int, experts: int, tied: int, time: StageTime, setup: StepSetup, links: Links
) -> float:
    """Seconds after the last backward until a stage's gradients are summed over dp and ties."""
    has_parts = setup.sharding_level and not setup.execution.sums_ties_whole
    waited = links.tie_s(tied * setup.wire_bytes / (setup.num_shards if has_parts else 1))
    holders = max(setup.mesh.num_replicas, links.expert_replicas.count if links.deals_out_experts else 1)
    if holders == 1 or setup.sharding_level >= 2:
        return waited
    num_buckets = _num_buckets(setup, elements)
    waited += moved_s(elements * setup.execution.packing_bytes, links.cluster.device)
    is_scattered = setup.sharding_level and not setup.execution.sums_whole
    summed_s = Replicas.scatter_s if is_scattered else Replicas.sum_s
    all_s = _of_holders(
        elements, experts, links, lambda of, n: summed_s(of, n * setup.wire_bytes, _num_buckets(setup, n))
    )
    if not setup.execution.overlaps_gradients:
        return waited + all_s
    return waited + exposed_s(all_s, time.backward_s, links.overlap_slowdown, all_s / num_buckets)


def least_reduction_s(
    elements: int, experts: int, backward_s: float, setup: StepSetup, links: Links
) -> float:
    """What a stage of at least so many elements, whose backward takes so long at most, waits for after the last one."""
    return _reduction_s(elements, experts, 0, StageTime(0.0, backward_s), setup, links)


def least_update_s(elements: float, experts: float, part: float, setup: StepSetup, links: Links) -> float:
    """What the busiest rank's optimizer and gather of new parameters take, where ranks have so many elements and own such a part of them in
    the mean."""
    seconds = _optimizer_s((), 0, part, setup, links)
    if setup.sharding_level == 1 and not setup.execution.broadcasts_parameters:

        def gather_s(of: Replicas, number: float) -> float:
            num_bytes, least = number * setup.compute_bytes, 1 if of is links.replicas else 0
            return of.shards_s("all_gather", num_bytes, max(least, int(num_bytes // setup.bucket_bytes)))

        seconds += _of_holders(elements, experts, links, gather_s)
    return seconds


def _tied_elements(profile: Profile, setup: StepSetup, stage: int, units: Sequence[UnitCost]) -> int:
    """Elements of the parameters that this stage shares with another."""
    own = {name for unit in units for name in unit.shared}
    if not own:
        return 0
    inside = setup.units_of(stage, profile)
    others = {name for i, unit in enumerate(profile.units) if i not in inside for name in unit.shared}
    return sum(profile.shared_elements[name] for name in own & others)


def _optimizer_s(
    units: Sequence[UnitCost], elements: int, part: float, setup: StepSetup, links: Links
) -> float:
    """The optimizer over what a rank owns."""
    if setup.execution.update_bytes is not None:
        return moved_s(part * setup.execution.update_bytes, links.cluster.device)
    if setup.is_offloaded:
        return offloaded_update_s(
            part,
            links.cluster.device,
            down_bytes=setup.gradient_bytes,
            up_bytes=setup.stored_bytes,
            element_bytes=setup.master_bytes,
        )
    num_tensors = _num_buckets(setup, elements)
    if setup.sharding_level >= 2:
        num_tensors = sum(unit.num_parameters for unit in units)
    return optimizer_s(part, setup.master_bytes, num_tensors, links.cluster.device)


def _new_parameters_s(elements: int, experts: int, setup: StepSetup, links: Links) -> float:
    """The gather of the new parameters under ZeRO-1."""
    if setup.sharding_level != 1:
        return 0.0

    def gather_s(of: Replicas, number: float) -> float:
        if setup.execution.broadcasts_parameters:
            return of.shards_s("broadcast", number * setup.compute_bytes, of.num_shards)
        return of.shards_s("all_gather", number * setup.compute_bytes, _num_buckets(setup, number))

    return _of_holders(elements, experts, links, gather_s)


def _num_buckets(setup: StepSetup, elements: float) -> int:
    return int(max(1, -(-elements * setup.compute_bytes // setup.bucket_bytes)))
