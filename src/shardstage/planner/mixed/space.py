"""``MixedSpace``: everything that a search over several classes of devices may choose.

by stages    each pipeline runs through all classes: so many pipeline ranks (``ways``) on each, samples dealt out evenly
by shares    each pipeline lies on one class: so many pipelines (``ways``) on each; a class takes as many samples of a microbatch as it
             computes in the time of the others

tp × sp × cp         ranks that share samples lie on one class, as do those that share experts; devices of a class that fill no group
ep × etp             stay idle, as do pipelines that experts cannot be dealt out to
ways × pp × dp       stages: the largest dp for each ``ways``, or the least that runs as few microbatches; shares: every pp
microbatch           the sizes of the search over one class, and between classes of unlike speed every size up to ``EVERY_SIZE``
ZeRO, schedule       as over one class; ZeRO cuts over all replicas
                     replicas of cut sequences or dealt experts are neighbours, so that these go by shares without a pipeline only
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from shardstage.layout import AXES, Mesh
from shardstage.plan.complete import proportional_shares
from shardstage.planner.space import DP_OUTSIDE, Schedule, Space, Zero

__all__ = ["Arrangement", "Lane", "MixedChoice", "MixedSpace", "Sharding"]

Array = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

EVERY_SIZE: Final = 64
"""Up to here a class may take any number of samples of a microbatch; beyond, those that the search over one class tries."""


class Lane(NamedTuple):
    """Pipelines that are alike: the class of each pipeline rank, and the samples of the largest microbatch."""

    classes: tuple[int, ...]
    size: int


class Sharding(NamedTuple):
    """How a unit of the model is cut: where that is the same, a microbatch of a unit costs the same."""

    tp: int
    is_sequence_parallel: bool
    cp: int = 1
    ep: int = 1
    has_whole_experts: bool = False

    @property
    def cut(self) -> Sharding:
        """How it cuts operators, whoever shares sequences and experts."""
        return self._replace(cp=1, ep=1)

    @property
    def num_ranks(self) -> int:
        """Those that share a sample."""
        return self.tp * self.cp

    @property
    def is_plain(self) -> bool:
        """Whether neither sequences nor experts are shared but along tp."""
        return self.cp == self.ep == 1 and not self.has_whole_experts

    @property
    def dp_step(self) -> int:
        """Of so many data-parallel ranks, or a multiple of that, all experts' holders are."""
        return self.ep // math.gcd(self.ep, self.cp * (self.tp if self.has_whole_experts else 1))


class Arrangement(NamedTuple):
    """Who does how much: ``sizes`` are the samples of a microbatch on each class, of which there are ``num_microbatches``."""

    by: Literal["stages", "shares"]
    sharding: Sharding
    pp: int
    dp: int
    ways: tuple[int, ...]
    sizes: tuple[int, ...]
    num_microbatches: int

    @property
    def mesh(self) -> Mesh:
        is_outside = self.by == "shares" and self.pp > 1
        tp, cp = self.sharding.tp, self.sharding.cp
        return Mesh(pp=self.pp, dp=self.dp, tp=tp, cp=cp, order=DP_OUTSIDE if is_outside else AXES)

    @property
    def used(self) -> tuple[int, ...]:
        """Devices of each class that compute; the others stay idle."""
        each = self.sharding.num_ranks * (self.dp if self.by == "stages" else self.pp)
        return tuple(each * number for number in self.ways)

    @property
    def lanes(self) -> tuple[Lane, ...]:
        if self.by == "stages":
            return (
                Lane(tuple(i for i, number in enumerate(self.ways) for _ in range(number)), self.sizes[0]),
            )
        return tuple(Lane((i,) * self.pp, size) for i, size in enumerate(self.sizes))

    def shares(self, global_batch: int) -> tuple[int, ...]:
        """Samples of each data-parallel rank."""
        return proportional_shares(global_batch, self._weights)

    def samples(self, global_batch: int) -> tuple[int, ...]:
        """Samples of a step that each class sees: all of them by stages."""
        if self.by == "stages":
            return (global_batch,) * len(self.ways)
        ends = [0, *accumulate(self.ways)]
        shares = self.shares(global_batch)
        return tuple(sum(shares[first:end]) for first, end in pairwise(ends))

    @property
    def _weights(self) -> tuple[int, ...]:
        if self.by == "stages":
            return (1,) * self.dp
        return tuple(size for size, number in zip(self.sizes, self.ways, strict=True) for _ in range(number))


class MixedChoice(NamedTuple):
    """One point of the space."""

    arrangement: Arrangement
    zero: Zero
    schedule: Schedule


_Mesh = tuple[Literal["stages", "shares"], int, int, tuple[int, ...]]
"""By what, pp, dp and ways."""


@dataclass(frozen=True, kw_only=True)
class MixedSpace:
    """``declared`` says what each decision may be; ``num_devices`` are those of each class."""

    declared: Space
    num_devices: tuple[int, ...]
    num_units: int
    is_scalable: bool = True

    @property
    def fingerprint(self) -> str:
        """A hash of the declaration."""
        return hashlib.sha256(repr((self.declared, self.num_devices, self.num_units)).encode()).hexdigest()[
            :16
        ]

    @property
    def shardings(self) -> tuple[Sharding, ...]:
        """All that each class has ranks for."""
        declared, most = self.declared, min(self.num_devices)
        offered = (
            Sharding(tp, is_sp, cp, ep, is_whole)
            for tp in declared.tps
            for is_sp in (declared.sequence_parallel if tp > 1 else (False,))
            for is_whole in declared.whole_experts_at(tp, is_sp=is_sp)
            for cp in declared.cps
            for ep in declared.eps
        )
        return tuple(each for each in offered if each.num_ranks * each.dp_step <= most)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Samples of a microbatch that a class may take."""
        offered = self.declared.microbatches
        if not self.is_scalable:
            return offered
        if len(offered) == 1:
            return tuple(range(1, offered[0] + 1))
        return tuple(sorted({*offered, *range(1, min(EVERY_SIZE, offered[-1]) + 1)}))

    def zeros_of(self, arrangement: Arrangement) -> tuple[Zero, ...]:
        return self.declared.zeros_of(arrangement.mesh)

    def schedules_of(self, arrangement: Arrangement) -> tuple[Schedule, ...]:
        """Those with no more stages than there are units."""
        return tuple(
            schedule
            for schedule in self.declared.schedules_of(arrangement.pp)
            if arrangement.pp * schedule.per_rank <= self.num_units
        )

    def num_choices(self, arrangements: Sequence[Arrangement]) -> tuple[int, int]:
        """How many choices have one of these arrangements, which are of one sharding, and how many of them another one equals."""
        num_offered, by_rule, dominated = 0, 0, self.declared.dominated
        alike = Counter((of.pp, of.dp) for of in arrangements)
        one = {(of.pp, of.dp): of for of in arrangements}
        for key, number in alike.items():
            schedules, zeros = self.schedules_of(one[key]), self.zeros_of(one[key])
            num_offered += number * len(zeros) * len(schedules)
            by_rule += number * len(zeros) * sum(schedule in dominated for schedule in schedules)
        return num_offered, by_rule

    def arrangements(self, sharding: Sharding, seconds: Array) -> Iterator[Arrangement]:
        """Of one sharding; ``seconds`` [class, size] are what all units take a class for a microbatch of each of ``sizes``."""
        groups, paced = [number // sharding.num_ranks for number in self.num_devices], self._paced(seconds)
        by_stages = self._meshes_by_stages(groups, sharding.dp_step)
        for by, pp, dp, ways in chain(by_stages, self._meshes_by_shares(groups, sharding)):
            deals = self._even_deals(dp) if by == "stages" else self._uneven_deals(ways, paced)
            for sizes, num_microbatches in deals:
                sizes = sizes * len(groups) if by == "stages" else sizes
                found = Arrangement(by, sharding, pp, dp, ways, sizes, num_microbatches)
                if not self.declared.uses_all_ranks or found.used == self.num_devices:
                    yield found

    def _meshes_by_stages(self, groups: Sequence[int], step: int) -> Iterator[_Mesh]:
        """For each number of pipeline ranks on the classes the most pipelines, or the fewest with as small a share; of either a multiple of
        ``step``."""
        if AXES not in self.declared.orders:
            return
        batch, known = self.declared.global_batch, set()
        for most in self.declared.dps or range(min(*groups, batch), 0, -1):
            ways = tuple(number // most for number in groups)
            pp = sum(ways)
            if most % step or min(ways) < 1 or most > batch or pp not in self.declared.pps or ways in known:
                continue
            known.add(ways)
            fewest = most if self.declared.dps else -(-batch // (-(-batch // most)))
            for dp in dict.fromkeys((most, -(-fewest // step) * step)):
                yield "stages", pp, dp, ways

    def _meshes_by_shares(self, groups: Sequence[int], sharding: Sharding) -> Iterator[_Mesh]:
        """All pipelines that a class has ranks for, without some that experts cannot be dealt out to."""
        step = sharding.dp_step
        for pp in self.declared.pps if sharding.is_plain else {1} & {*self.declared.pps}:
            ways = tuple(number // pp // step * step for number in groups)
            dp = sum(ways)
            is_ordered = pp == 1 or DP_OUTSIDE in self.declared.orders
            is_asked = not self.declared.dps or dp in self.declared.dps
            if min(ways) >= 1 and dp <= self.declared.global_batch and is_ordered and is_asked:
                yield "shares", pp, dp, ways

    def _even_deals(self, dp: int) -> Iterator[tuple[tuple[int, ...], int]]:
        """Sizes of microbatches of equal shares, as over one class."""
        share = -(-self.declared.global_batch // dp)
        for size in self.declared.microbatches:
            if bool(self.declared.sizes(size, dp, share)):
                yield (size,), -(-share // size)

    def _uneven_deals(self, ways: tuple[int, ...], paced: Numbers) -> Iterator[tuple[tuple[int, ...], int]]:
        """For every number of microbatches that some size leads to the samples of each class that are done soonest."""
        batch = self.declared.global_batch
        capacity = paced @ np.array(ways)
        numbers = np.unique(-(-batch // capacity))
        places = np.searchsorted(capacity, -(-batch // numbers))
        sizes, is_dealt = _largest(batch, np.array(ways), paced[places], numbers)
        for m, found in zip(numbers[is_dealt].tolist(), map(tuple, sizes[is_dealt].tolist()), strict=True):
            if self._is_offered(found):
                yield found, m

    def _is_offered(self, sizes: tuple[int, ...]) -> bool:
        """Where a size was asked for, it is the largest one."""
        return len(self.declared.microbatches) > 1 or max(sizes) == self.declared.microbatches[0]

    def _paced(self, seconds: Array) -> Numbers:
        """[pace, class]: samples that each class takes at most where none is to take longer than the slowest of them, fewest first."""
        seconds = np.maximum.accumulate(seconds, axis=1)
        sizes = np.array(self.sizes)
        at_least = seconds[:, 0].max()
        paces = np.unique(seconds[seconds >= at_least])
        columns = [sizes[np.searchsorted(row, paces, side="right") - 1] for row in seconds]
        return np.unique(np.stack(columns, axis=1), axis=0)


def _largest(batch: int, ways: Numbers, sizes: Numbers, num_microbatches: Numbers) -> tuple[Numbers, Mask]:
    """The largest microbatch of each class [deal, class] where shares go in proportion to sizes, by ``proportional_shares``; and in which
    deals no microbatch is empty, and fewer would not do."""
    m, total = num_microbatches, sizes @ ways
    whole, left_over = batch * sizes // total[:, None], batch * sizes % total[:, None]
    order = np.argsort(-left_over, axis=1, kind="stable")
    before = np.cumsum(ways[order], axis=1) - ways[order]
    more = np.clip((batch - whole @ ways)[:, None] - before, 0, ways[order])
    extra = np.empty_like(more)
    np.put_along_axis(extra, order, more, axis=1)
    most, least = whole + (extra > 0), whole + (extra == ways)
    found = -(-most // m[:, None])
    is_exact = -(-most.max(axis=1) // found.max(axis=1)) == m
    return found, (least.min(axis=1) >= m) & is_exact
