"""``alternatives``: what one other decision would cost, and why it was not taken; ``front``: what less memory costs;
``best_of_other_meshes``: what comes after the best plan.

An alternative is the best plan with one decision changed and its stages cut anew: twice or half the tensor-parallel ranks, another ZeRO
level, another schedule. Where the change asks for a decision that the best plan has no use for (sp without tp, a schedule without pp), the
fastest one is taken and said. Its reason names the cause that grew most, or the memory that it lacks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from shardstage.cost import rank_memory, step_seconds
from shardstage.cost.balance import balanced
from shardstage.layout import AXES, Mesh
from shardstage.plan import shorthand
from shardstage.planner.found import KEPT_RUNNERS_UP, mesh_key
from shardstage.planner.pricing import Priced
from shardstage.planner.search import Candidate, Searcher, SearchResult, pareto, usable_bytes
from shardstage.planner.space import Choice, Group, Schedule, Space
from shardstage.planner.told import (
    Alternative,
    Point,
    cause_text,
    etp_change,
    excess_text,
    in_order,
    leaving_text,
    schedule_text,
    slower_text,
    zero_text,
)

__all__ = ["alternatives", "best_of_other_meshes", "front"]


def alternatives(searcher: Searcher, found: SearchResult) -> tuple[Alternative, ...]:
    """Every single change of the best plan's decisions, cheapest first."""
    best, limit_bytes = found.priced, found.limit_bytes
    searcher.use(found.savers)
    told = []
    for change, variants in _changed(searcher, best):
        fitting = _priced(searcher, variants, limit_bytes)
        if not fitting:
            reason = _excess(searcher, variants, limit_bytes)
            told.append(Alternative(change=change, reason=reason, prediction=None))
            continue
        fastest = min(fitting, key=lambda each: each.seconds)
        said = f"{change}{_also(best.choice, fastest.choice)}" if len(variants) > 1 else change
        reason = _slower(searcher, best, fastest)
        told.append(Alternative(change=said, reason=reason, prediction=fastest.prediction))
    return in_order(told)


def front(searcher: Searcher, found: SearchResult) -> tuple[Point, ...]:
    """What less memory costs: of all plans that the search and ``alternatives`` priced, those that nothing faster undercuts."""
    priced = pareto([*found.front, *_of_one_change(searcher, found)])
    return tuple(_point(searcher, each) for each in priced)


def best_of_other_meshes(searcher: Searcher, found: SearchResult) -> tuple[Candidate, ...]:
    """``found.runners_up``, and what ``alternatives`` priced of their meshes and of others where that is faster; fastest first."""
    fastest = {mesh_key(each.plan.mesh, each.plan.ep): each for each in found.runners_up}
    for priced in _of_one_change(searcher, found):
        key = mesh_key(priced.choice.mesh, priced.choice.group.ep)
        if key not in fastest or priced.seconds < fastest[key].prediction.step_time_s:
            plan = searcher.as_plan(priced)
            text = shorthand(plan, default_precision=searcher.precision)
            fastest[key] = Candidate(text=text, prediction=priced.prediction, plan=plan)
    fastest.pop(mesh_key(found.best.mesh, found.best.ep), None)
    others = sorted(fastest.values(), key=lambda each: each.prediction.step_time_s)
    return tuple(others[:KEPT_RUNNERS_UP])


def _of_one_change(searcher: Searcher, found: SearchResult) -> Iterator[Priced]:
    """The best plan with one decision changed, where that fits."""
    searcher.use(found.savers)
    for _, variants in _changed(searcher, found.priced):
        yield from _priced(searcher, variants, found.limit_bytes)


def _point(searcher: Searcher, priced: Priced) -> Point:
    plan, peak_bytes = searcher.as_plan(priced), priced.prediction.peak_bytes
    return Point(
        plan=plan,
        text=shorthand(plan, default_precision=searcher.precision),
        prediction=priced.prediction,
        class_peaks=(peak_bytes,),
        fill_ratio=peak_bytes / usable_bytes(searcher.cluster),
    )


def _priced(searcher: Searcher, variants: Sequence[Choice], limit_bytes: int) -> list[Priced]:
    """Those that fit."""
    priced = (searcher.pricing.price(choice, limit_bytes) for choice in variants)
    return [each for each in priced if each is not None]


def _also(before: Choice, after: Choice) -> str:
    """What came with a change of axes, where the best plan could not decide it."""
    also = ""
    if before.group.tp == 1 and after.group.is_sequence_parallel:
        also += ", sp"
    if before.mesh.pp == 1 and after.schedule != before.schedule:
        also += f", {schedule_text(after.schedule)}"
    return also


def _changed(searcher: Searcher, best: Priced) -> Iterator[tuple[str, tuple[Choice, ...]]]:
    """The choice with one decision changed, as far as it exists for so many ranks; axes with all that they open."""
    choice = best.choice
    for name in ("tp", "pp", "cp"):
        size = choice.mesh.size(name)
        for other in (2 * size, size // 2):
            if other >= 1 and (changed := _with_axis(searcher, choice, name, other)) is not None:
                yield f"{name} {size} → {other}", tuple(_opened(searcher, choice, changed))
    for change, changed in _changed_alone(searcher, choice):
        yield change, (changed,)


def _opened(searcher: Searcher, before: Choice, changed: Choice) -> Iterator[Choice]:
    """The first tensor-parallel ranks may share sequences or not, the first pipeline may have any schedule that none betters."""
    space, group, mesh = searcher.space, changed.group, changed.mesh
    groups, schedules = [group], [changed.schedule]
    if before.mesh.tp == 1 < mesh.tp:
        groups = [group._replace(is_sequence_parallel=is_sp) for is_sp in space.sequence_parallel]
    if before.mesh.pp == 1 < mesh.pp:
        kinds: dict[str, Schedule] = {}
        for each in space.schedules_of(mesh.pp):
            if each not in space.dominated and mesh.pp * each.per_rank <= searcher.num_units:
                kinds.setdefault(each.name, each)
        schedules = list(kinds.values()) or schedules
    for group in groups:
        for schedule in schedules:
            yield replace(changed, group=group, schedule=schedule)


def _changed_alone(searcher: Searcher, choice: Choice) -> Iterator[tuple[str, Choice]]:
    """Everything but the sizes of axes."""
    space, mesh, group = searcher.space, choice.mesh, choice.group
    for zero in space.zeros_of(mesh):
        if zero != choice.zero:
            yield f"zero {zero_text(choice.zero)} → {zero_text(zero)}", replace(choice, zero=zero)
    for schedule in _schedules(searcher, choice):
        yield (
            f"schedule {schedule_text(choice.schedule)} → {schedule_text(schedule)}",
            replace(choice, schedule=schedule),
        )
    for microbatch in (2 * group.microbatch, group.microbatch // 2):
        changed_group = group._replace(microbatch=microbatch)
        share = -(-space.global_batch // mesh.dp)
        if microbatch in space.microbatches and space.takes(changed_group, mesh, share):
            yield f"mb {group.microbatch} → {microbatch}", replace(choice, group=changed_group)
    if mesh.tp > 1:
        flipped = group._replace(is_sequence_parallel=not group.is_sequence_parallel)
        if _is_offered(space, flipped):
            yield ("no sp" if group.is_sequence_parallel else "sp"), replace(choice, group=flipped)
        others = group._replace(has_whole_experts=not group.has_whole_experts)
        if _is_offered(space, others) and space.takes(others, mesh, -(-space.global_batch // mesh.dp)):
            yield etp_change(group.tp, is_whole=group.has_whole_experts), replace(choice, group=others)
    if mesh.order == AXES and len(space.orders_of(mesh)) > 1:
        outside = replace(mesh, order=space.orders[1])
        if space.takes(group, outside, -(-space.global_batch // mesh.dp)):
            yield "dp outside pp", replace(choice, mesh=outside)


def _is_offered(space: Space, group: Group) -> bool:
    """Whether experts may be as whole as the group has them."""
    return group.has_whole_experts in space.whole_experts_at(group.tp, is_sp=group.is_sequence_parallel)


def _with_axis(searcher: Searcher, choice: Choice, axis: str, size: int) -> Choice | None:
    space, mesh, group = searcher.space, choice.mesh, choice.group
    sizes = {"tp": mesh.tp, "pp": mesh.pp, "cp": mesh.cp, axis: size}
    dp = min(space.num_ranks // (sizes["tp"] * sizes["pp"] * sizes["cp"]), space.global_batch)
    offered = {"tp": space.tps, "pp": space.pps, "cp": space.cps}[axis]
    if size not in offered or dp < 1 or (space.dps and dp not in space.dps):
        return None
    changed = Mesh(pp=sizes["pp"], dp=dp, tp=sizes["tp"], cp=sizes["cp"])
    changed = replace(changed, order=space.orders_of(changed)[0])
    share = -(-space.global_batch // dp)
    other = group._replace(
        tp=sizes["tp"],
        cp=sizes["cp"],
        is_sequence_parallel=group.is_sequence_parallel and sizes["tp"] > 1,
        has_whole_experts=group.has_whole_experts and sizes["tp"] > 1,
    )
    sized = sorted(space.microbatches, key=lambda b: abs(b - group.microbatch))
    fitting = next((b for b in sized if space.takes(other._replace(microbatch=b), changed, share)), None)
    if fitting is None:
        return None
    zeros = space.zeros_of(changed)
    if not zeros:
        return None
    zero = choice.zero if choice.zero in zeros else zeros[0]
    schedule = choice.schedule if sizes["pp"] > 1 else Schedule("1f1b", 1)
    if sizes["pp"] * schedule.per_rank > searcher.num_units:
        return None
    return Choice(mesh=changed, group=other._replace(microbatch=fitting), zero=zero, schedule=schedule)


def _schedules(searcher: Searcher, choice: Choice) -> Iterator[Schedule]:
    """One of each other kind, with the fewest stages a rank."""
    names = {choice.schedule.name}
    for schedule in searcher.space.schedules_of(choice.mesh.pp):
        if schedule.name not in names and choice.mesh.pp * schedule.per_rank <= searcher.num_units:
            names.add(schedule.name)
            yield schedule


def _slower(searcher: Searcher, best: Priced, other: Priced) -> str:
    """By how much, and the cause that grew most."""
    why = cause_text(
        best.prediction,
        other.prediction,
        again_s=_again_s(searcher, other) - _again_s(searcher, best),
        by_tp=leaving_text(searcher.cluster, other.choice.mesh.tp),
        uneven_s=_uneven_s(other) - _uneven_s(best),
    )
    return slower_text(best.prediction, other.prediction, why)


def _again_s(searcher: Searcher, priced: Priced) -> float:
    """Seconds of a step that recomputation takes."""
    if priced.setup.recompute == "none" and not priced.setup.recompute_of_stages:
        return 0.0
    keeping = replace(priced.setup, recompute="none", recompute_of_stages=())
    profile = searcher.pricing.chain(priced.choice.group).profile
    return priced.seconds - step_seconds(profile, keeping, searcher.pricing.links(priced.choice))


def _uneven_s(priced: Priced) -> float:
    """Seconds of a step that the busiest rank computes beyond the mean."""
    stages, num_ranks = priced.prediction.stages, priced.choice.mesh.pp
    shares = [sum(stages[n].compute_ratio for n in priced.setup.stages_of(r)) for r in range(num_ranks)]
    parts = priced.prediction.parts
    return (parts["products"] + parts["memory"]) * (1 - 1 / (num_ranks * max(shares)))


def _excess(searcher: Searcher, variants: Sequence[Choice], limit_bytes: int) -> str:
    """What the smallest variant's fullest rank holds where everything is recomputed."""
    peaks = min((_recomputing_peaks(searcher, choice) for choice in variants), key=max)
    fullest = peaks.index(max(peaks))
    who = f"pipeline rank {fullest}" if len(peaks) > 1 else ""
    return excess_text(who, peaks[fullest], limit_bytes)


def _recomputing_peaks(searcher: Searcher, choice: Choice) -> list[int]:
    """Bytes of each pipeline rank where everything is recomputed."""
    profile = searcher.pricing.chain(choice.group).profile
    setup = replace(searcher.pricing.setup(choice), recompute=searcher.pricing.modes[-1])
    weights = [unit.forward_s + unit.backward_s for unit in profile.units]
    setup = replace(setup, starts=balanced(weights, setup.num_stages))
    return [rank_memory(profile, setup, rank).total_bytes for rank in range(setup.mesh.pp)]
