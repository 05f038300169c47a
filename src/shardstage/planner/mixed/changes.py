"""``changes``: the best plan for several classes of devices with one decision changed, before anything is priced.

Twice or half the ranks of an axis, another ZeRO level, schedule, microbatch or recomputation, pipelines that lie on the classes in the
other way, a layer or a sample of a microbatch more for one class, as many for each device of all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from types import MappingProxyType
from typing import Final, Literal, NamedTuple

from shardstage.cost.profile import RECOMPUTES, Recompute
from shardstage.plan.complete import proportional_shares
from shardstage.planner.mixed.priced import MixedPriced
from shardstage.planner.mixed.search import MixedSearcher
from shardstage.planner.mixed.shares import layers_by_class
from shardstage.planner.mixed.space import Arrangement, MixedChoice, MixedSpace, Sharding
from shardstage.planner.space import Schedule
from shardstage.planner.told import etp_change, schedule_text, zero_text

__all__ = ["LIES", "Change", "changes"]

By = Literal["stages", "shares"]

LIES: Final = MappingProxyType(
    {"stages": "each pipeline through all classes", "shares": "each pipeline on one class"}
)

OTHERWISE: Final = 2


class Change(NamedTuple):
    """What is changed, and the choices that keep all else as it is: one, or some of which the fastest is meant.

    ``firsts`` are the units at which each class begins, and ``recompute`` is what all stages recompute, where that is the change.
    """

    text: str
    variants: tuple[MixedChoice, ...]
    firsts: tuple[int, ...] = ()
    recompute: Recompute | None = None


def changes(searcher: MixedSearcher, best: MixedPriced) -> Iterator[Change]:
    """Every single change of the best plan's decisions, as far as it exists for so many devices; axes with all that they open."""
    for kind in (_of_axes, _of_sharding, _of_choice, _of_microbatch, _of_layers, _of_samples, _of_recompute):
        yield from (change for change in kind(searcher, best) if change.variants)


def _of_axes(searcher: MixedSearcher, best: MixedPriced) -> Iterator[Change]:
    of = best.choice.arrangement
    tp, cp = of.sharding.tp, of.sharding.cp
    for other in _around(tp):
        cut = of.sharding._replace(tp=other, has_whole_experts=of.sharding.has_whole_experts and other > 1)
        sharings = (False, True) if tp == 1 else (cut.is_sequence_parallel and other > 1,)
        shardings = [cut._replace(is_sequence_parallel=is_sp) for is_sp in sharings]
        yield Change(f"tp {tp} → {other}", tuple(_kept(searcher, best.choice, shardings)))
    for other in _around(cp):
        yield Change(
            f"cp {cp} → {other}", tuple(_kept(searcher, best.choice, [of.sharding._replace(cp=other)]))
        )
    for other in _around(of.pp):
        yield Change(f"pp {of.pp} → {other}", tuple(_with_pp(searcher, best.choice, other)))


def _around(size: int) -> Iterator[int]:
    yield 2 * size
    if size > 1:
        yield size // 2


def _kept(
    searcher: MixedSearcher, choice: MixedChoice, shardings: Iterable[Sharding], by: By | None = None
) -> Iterator[MixedChoice]:
    """The choice under other shardings that are offered, or by stages or shares, with microbatches as large as they were, or nearly."""
    of = choice.arrangement
    for sharding in shardings:
        if sharding in searcher.space.shardings:
            for found in _alike(searcher, choice, sharding, by or of.by, of.pp):
                yield from _as_before(searcher.space, choice, found, (choice.schedule,))


def _alike(
    searcher: MixedSearcher, choice: MixedChoice, sharding: Sharding, by: By, pp: int
) -> list[Arrangement]:
    """With microbatches as large as they were, or nearly. Dealt in the other way, by stages or shares, classes may take up to twice as
    many samples: the largest of unlike ones stand for others than equal ones."""
    size, found = max(choice.arrangement.sizes), _all(searcher, sharding, by, pp)
    larger = [each for each in found if size <= max(each.sizes) <= OTHERWISE * size]
    return larger if larger and by != choice.arrangement.by else _nearest(found, size)


def _all(searcher: MixedSearcher, sharding: Sharding, by: By, pp: int) -> list[Arrangement]:
    return [each for each in searcher.arrangements(sharding) if (each.by, each.pp) == (by, pp)]


def _nearest(arrangements: Sequence[Arrangement], size: int) -> list[Arrangement]:
    """Those of the size of microbatches that is nearest."""
    sizes = {max(each.sizes) for each in arrangements}
    nearest = min(sizes, key=lambda each: (abs(each - size), each), default=0)
    return [each for each in arrangements if max(each.sizes) == nearest]


def _as_before(
    space: MixedSpace, choice: MixedChoice, found: Arrangement, schedules: Iterable[Schedule]
) -> Iterator[MixedChoice]:
    """Another arrangement with the same ZeRO, or the least that it may have, under each of the schedules that it may have."""
    zeros, offered = space.zeros_of(found), space.schedules_of(found)
    for schedule in schedules if zeros else ():
        if schedule in offered:
            yield MixedChoice(found, choice.zero if choice.zero in zeros else zeros[0], schedule)


def _with_pp(searcher: MixedSearcher, choice: MixedChoice, pp: int) -> Iterator[MixedChoice]:
    """The first pipeline may have any schedule that none betters, and lie on one class or on all."""
    of, space = choice.arrangement, searcher.space
    ways: tuple[By, ...] = (of.by,) if min(of.pp, pp) > 1 else ("stages", "shares")
    for by in ways:
        for found in _alike(searcher, choice, of.sharding, by, pp):
            schedules: Iterable[Schedule] = (choice.schedule,)
            if min(of.pp, pp) == 1:
                dominated = space.declared.dominated
                schedules = _kinds(each for each in space.schedules_of(found) if each not in dominated)
            yield from _as_before(space, choice, found, schedules)


def _kinds(schedules: Iterable[Schedule]) -> Iterator[Schedule]:
    """One of each name, with the fewest stages a rank, which come first."""
    found: dict[str, Schedule] = {}
    for schedule in schedules:
        found.setdefault(schedule.name, schedule)
    yield from found.values()


def _of_sharding(searcher: MixedSearcher, best: MixedPriced) -> Iterator[Change]:
    of = best.choice.arrangement
    sharding = of.sharding
    if sharding.tp > 1:
        is_sp, is_whole = sharding.is_sequence_parallel, sharding.has_whole_experts
        flipped = sharding._replace(is_sequence_parallel=not is_sp)
        yield Change("no sp" if is_sp else "sp", tuple(_kept(searcher, best.choice, [flipped])))
        others = sharding._replace(has_whole_experts=not is_whole)
        text = etp_change(sharding.tp, is_whole=is_whole)
        yield Change(text, tuple(_kept(searcher, best.choice, [others])))
    if of.pp > 1:
        by: By = "shares" if of.by == "stages" else "stages"
        yield Change(LIES[by], tuple(_kept(searcher, best.choice, [sharding], by)))


def _of_choice(searcher: MixedSearcher, best: MixedPriced) -> Iterator[Change]:
    choice, space = best.choice, searcher.space
    for zero in space.zeros_of(choice.arrangement):
        if zero != choice.zero:
            text = f"zero {zero_text(choice.zero)} → {zero_text(zero)}"
            yield Change(text, (choice._replace(zero=zero),))
    for schedule in _kinds(space.schedules_of(choice.arrangement)):
        if schedule.name != choice.schedule.name:
            text = f"schedule {schedule_text(choice.schedule)} → {schedule_text(schedule)}"
            yield Change(text, (choice._replace(schedule=schedule),))


def _of_microbatch(searcher: MixedSearcher, best: MixedPriced) -> Iterator[Change]:
    choice = best.choice
    of, size = choice.arrangement, max(choice.arrangement.sizes)
    alike = _all(searcher, of.sharding, of.by, of.pp)
    for other, side in (
        (2 * size, [each for each in alike if max(each.sizes) > size]),
        (size // 2, [each for each in alike if max(each.sizes) < size]),
    ):
        found = _nearest(side, other)
        variants = (
            each for one in found for each in _as_before(searcher.space, choice, one, (choice.schedule,))
        )
        yield Change(f"mb {size} → {max(found[0].sizes) if found else 0}", tuple(variants))


def _of_layers(searcher: MixedSearcher, best: MixedPriced) -> Iterator[Change]:
    """A layer more for one class and fewer for its neighbour; as many for each device."""
    of, pricing = best.choice.arrangement, searcher.pricing
    layers = pricing.folded.layers
    begins = [unit for unit, layer in enumerate(layers) if layer >= 0 and layer not in layers[:unit]]
    if of.by == "shares" or best.choice.schedule.per_rank > 1 or not begins:
        return
    now = tuple(layers_by_class(pricing, best))
    for counts in _dealt_otherwise(now, proportional_shares(sum(now), of.ways)):
        if min(counts) < 1:
            continue
        firsts = (0, *(begins[first] for first in accumulate(counts[:-1])))
        lengths = [stop - first for first, stop in pairwise((*firsts, pricing.num_units))]
        if all(length >= number for length, number in zip(lengths, of.ways, strict=True)):
            yield Change(f"layers {_slashed(now)} → {_slashed(counts)}", (best.choice,), firsts)


def _dealt_otherwise(now: tuple[int, ...], even: tuple[int, ...]) -> Iterable[tuple[int, ...]]:
    """Between neighbours one to and fro, and the even deal."""
    found: dict[tuple[int, ...], None] = {}
    for place in range(len(now) - 1):
        for more in (1, -1):
            found[*now[:place], now[place] + more, now[place + 1] - more, *now[place + 2 :]] = None
    found[even] = None
    found.pop(now, None)
    return found


def _of_samples(searcher: MixedSearcher, best: MixedPriced) -> Iterator[Change]:
    """A sample of a microbatch more or fewer for a class; as many for each device."""
    choice, batch = best.choice, searcher.pricing.global_batch
    of = choice.arrangement
    if of.by == "stages" or not searcher.space.is_scalable:
        return
    one_more = [
        (*of.sizes[:place], size + more, *of.sizes[place + 1 :])
        for place, size in enumerate(of.sizes)
        for more in (1, -1)
    ]
    known = {of.samples(batch)}
    for sizes in (*one_more, (max(of.sizes),) * len(of.sizes)):
        dealt = None if min(sizes) < 1 else _dealt(of._replace(sizes=sizes), batch)
        if dealt is not None and (samples := dealt.samples(batch)) not in known:
            known.add(samples)
            text = f"samples {_slashed(of.samples(batch))} → {_slashed(samples)}"
            yield Change(text, (choice._replace(arrangement=dealt),))


def _dealt(of: Arrangement, batch: int) -> Arrangement | None:
    """Shares in proportion to the sizes, in as few microbatches of them as do; None where some of these would be empty."""
    ends = [*accumulate(of.ways)]
    shares = of.shares(batch)
    most = [max(shares[end - number : end]) for end, number in zip(ends, of.ways, strict=True)]
    m = max(-(-share // size) for share, size in zip(most, of.sizes, strict=True))
    found = of._replace(sizes=tuple(-(-share // m) for share in most), num_microbatches=m)
    is_kept = found.shares(batch) == shares and min(shares) >= m and -(-max(most) // max(found.sizes)) == m
    return found if is_kept else None


def _of_recompute(searcher: MixedSearcher, best: MixedPriced) -> Iterator[Change]:
    """The same for all layers."""
    now = {*(best.setup.recompute_of_stages or (best.setup.recompute,))}
    for mode in RECOMPUTES if searcher.pricing.asked is None else ():
        if now != {mode}:
            yield Change(f"recompute={mode}", (best.choice,), recompute=mode)


def _slashed(numbers: Iterable[int]) -> str:
    return "/".join(map(str, numbers))
