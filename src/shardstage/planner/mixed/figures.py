"""``MixedFigures``: what units cost on each class of devices under one sharding, as arrays over sizes of a microbatch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shardstage.cost.profile import RECOMPUTES, Recompute
from shardstage.planner.mixed.pricing import MixedPricing
from shardstage.planner.mixed.space import Arrangement, Sharding
from shardstage.planner.space import MAX_STAGES_PER_RANK

__all__ = ["MixedFigures"]

Array = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class MixedFigures:
    """What units cost under a sharding for each of some ``sizes`` of a microbatch: ``forward_s`` and ``backward_s`` [class, kind, size]
    with all waiting, ``weight_s`` [class, kind, size] of the backward that can be put off, ``again_s`` [mode][class, kind, size], ``saved``
    [mode][kind, size], bytes ``passing`` [kind, size] at least, ``own`` elements [kind], of them ``experts`` that not all replicas hold,
    those ``shared`` with other units [kind], ``number`` [kind], ``received`` [size]; ``first`` is the kind of the first unit."""

    sharding: Sharding
    sizes: npt.NDArray[np.int64]
    number: Array
    forward_s: Array
    backward_s: Array
    weight_s: Array
    again_s: Mapping[Recompute, Array]
    saved: Mapping[Recompute, Array]
    passing: Array
    own: Array
    experts: Array
    shared: Array
    first: int
    received: Array

    @property
    def whole_s(self) -> Array:
        """[class, size]: seconds of all units."""
        found: Array = np.einsum("u,cus->cs", self.number, self.forward_s + self.backward_s)
        return found

    @property
    def replicated(self) -> Array:
        """[kind]: elements that all replicas hold."""
        return self.own - self.experts

    def least_s(self, num_devices: Sequence[int], batch: int) -> float:
        """Seconds of a step at least, whatever the arrangement, its ZeRO and its schedule: all devices compute all the time, of each unit
        so many samples as is best for all (weak duality, as in ``bounds``, of samples' units that are dealt out by fractions)."""
        each = ((self.forward_s + self.backward_s) / self.sizes).min(axis=2)  # [class, kind], of a sample
        speed = 1 / (each @ self.number)
        groups = np.array(num_devices) // self.sharding.num_ranks
        return float(batch * (self.number @ (speed[:, None] * each).min(axis=0)) / (groups @ speed))

    def loosest_s(self, arrangements: Sequence[Arrangement]) -> Array:
        """[arrangement]: seconds of a step at least, whatever its ZeRO and its schedule: by the mean stage, the heaviest unit and the least
        bubble of all schedules."""
        found, places = (
            np.zeros(len(arrangements)),
            {int(size): place for place, size in enumerate(self.sizes)},
        )
        for by in ("stages", "shares"):
            rows = np.array([row for row, of in enumerate(arrangements) if of.by == by], dtype=np.int64)
            if not len(rows):
                continue
            own = [arrangements[row] for row in rows]
            size = np.array([[places[size] for size in of.sizes] for of in own]).T
            p, m = (np.array([getattr(of, name) for of in own]) for name in ("pp", "num_microbatches"))
            classes = np.arange(len(size))
            if by == "stages":
                found[rows] = self._least_of_lane_s(classes, np.array([of.ways for of in own]).T, size, p, m)
                continue
            each = [self._least_of_lane_s(classes[[i]], p[None], size[[i]], p, m) for i in classes]
            found[rows] = np.maximum.reduce(each)
        return found

    def _least_of_lane_s(self, on: Numbers, k: Any, size: Numbers, p: Any, m: Any) -> Array:
        """Of lanes [row] on some classes, with ``k`` [class, row] ranks on each and places of ``size`` [class, row]."""
        forward, backward = (
            each[on[:, None], :, size].transpose(0, 2, 1) for each in (self.forward_s, self.backward_s)
        )
        both = forward + backward  # [class, kind, row]
        speed = 1 / np.einsum("u,cur->cr", self.number, both)
        slowest = self.number @ (speed[:, None] * both).min(axis=0) / (k * speed).sum(axis=0)
        slowest = np.maximum(slowest, both.min(axis=0).max(axis=0))
        whole, forward_s = self.number @ both.min(axis=0), self.number @ forward.min(axis=0)
        bubble = (p - 1) / p * np.minimum(whole / MAX_STAGES_PER_RANK, forward_s / 2)
        found: Array = m * slowest + np.clip(whole - slowest, 0.0, bubble)
        return found

    @staticmethod
    def of(pricing: MixedPricing, shardings: Sequence[Sharding], sizes: Sequence[int]) -> list[MixedFigures]:
        """Of each of some shardings, which differ in cp and ep alone."""
        costs = pricing.costs.unit_costs(shardings, sizes)
        shape = (len(shardings), len(sizes))

        def table(figure: Any) -> Array:  # [sharding, class, kind, size]
            values = [[figure(unit).reshape(shape) for unit in kinds] for kinds in costs]
            return np.array(values, dtype=np.float64).transpose(2, 0, 1, 3)

        forward_s, backward_s = table(lambda unit: unit.forward_s), table(lambda unit: unit.backward_s)
        weight_s = table(lambda unit: unit.weight_s)
        elements = pricing.costs.profiler(shardings[0], 0).shared_elements
        modes: Sequence[Recompute] = RECOMPUTES
        again_s = {mode: table(lambda unit, m=mode: unit.recompute_s[m]) for mode in modes}
        saved = {mode: table(lambda unit, m=mode: unit.saved_bytes[m])[:, 0] for mode in modes}
        extra = [table(lambda unit, m=mode: unit.extra_bytes[m])[:, 0] for mode in modes]
        passing = np.minimum.reduce(extra) + table(lambda unit: unit.transient_bytes)[:, 0]
        own = table(lambda unit: unit.own_elements)[:, 0, :, 0]
        experts = own - table(lambda unit: unit.replicated_elements)[:, 0, :, 0]
        received, twins = table(lambda unit: unit.input_bytes)[:, 0], pricing.twins
        later = sorted({*twins[1:]}) or [0]
        return [
            MixedFigures(
                sharding=sharding,
                sizes=np.array(sizes),
                number=pricing.num_of_kinds,
                forward_s=forward_s[place],
                backward_s=backward_s[place],
                weight_s=weight_s[place],
                again_s={mode: each[place] for mode, each in again_s.items()},
                saved={mode: each[place] for mode, each in saved.items()},
                passing=passing[place],
                own=own[place],
                experts=experts[place],
                shared=np.array([float(unit.shared_elements(elements)) for unit in costs[0]]),
                first=twins[0],
                received=received[place, later].min(axis=0) * (len(twins) > 1),
            )
            for place, sharding in enumerate(shardings)
        ]
