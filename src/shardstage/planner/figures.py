"""``Figures``: what units cost in every group of choices, as arrays over groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from shardstage.cost.profile import Recompute
from shardstage.cost.units import UnitCosts

__all__ = ["Figures"]

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Of each kind of unit, [kind, group]: seconds of a microbatch with all waiting inside units, recomputation, bytes that are kept and
    that pass, elements. ``whole`` [kind] is how many units there are of each; ``replicated`` are those of the elements
    that all replicas hold, ``weight_s`` of the backward can be put off. ``received`` [group] the least bytes that a later unit is
    sent, ``shared`` [group] the elements of parameters that several units use, ``uses`` as often as these do."""

    whole: Array
    forward_s: Array
    backward_s: Array
    weight_s: Array
    again_s: Mapping[Recompute, Array]
    saved: Mapping[Recompute, Array]
    passing: Mapping[Recompute, Array]
    own: Array
    experts: Array
    replicated: Array
    received: Array
    shared: Array
    uses: Array

    @property
    def both_s(self) -> Array:
        return self.forward_s + self.backward_s

    @property
    def calls(self) -> Array:
        """Which units have parameters of their own, which ZeRO gathers."""
        return (self.own > 0).astype(np.float64)

    @property
    def units_s(self) -> Array:
        """[group]: of all units, forward and backward."""
        found: Array = self.whole @ self.both_s
        return found

    def at(self, groups: Any) -> Figures:
        """Of some groups."""
        found: dict[str, Any] = {"whole": self.whole}
        for field in fields(self)[1:]:
            values = getattr(self, field.name)
            if isinstance(values, Mapping):
                found[field.name] = {mode: each[:, groups] for mode, each in values.items()}
            else:
                found[field.name] = values[..., groups]
        return Figures(**found)

    @staticmethod
    def of(
        parts: Sequence[tuple[Any, Sequence[UnitCosts], Mapping[str, int]]], twins: Sequence[int]
    ) -> Figures:
        """From the costs of kinds of units in some groups (their numbers), and the elements of parameters that units share there. ``twins``
        are the kinds of the model's units."""
        order = np.argsort(np.concatenate([numbers for numbers, _, _ in parts]), kind="stable")
        modes: Sequence[Recompute] = tuple(parts[0][1][0].saved_bytes)

        def table(figure: Any) -> Array:
            found: Array = np.concatenate(
                [np.array([figure(costs) for costs in kinds], dtype=np.float64) for _, kinds, _ in parts],
                axis=1,
            )[:, order]
            return found

        def of_parts(each: Iterable[float]) -> Array:
            found = zip(parts, each, strict=True)
            return np.concatenate([np.full(len(numbers), value) for (numbers, _, _), value in found])[order]

        whole = np.bincount(twins).astype(np.float64)
        received = table(lambda costs: costs.input_bytes)
        return Figures(
            whole=whole,
            forward_s=table(lambda costs: costs.forward_s),
            backward_s=table(lambda costs: costs.backward_s),
            weight_s=table(lambda costs: costs.weight_s),
            again_s={mode: table(lambda costs, m=mode: costs.recompute_s[m]) for mode in modes},
            saved={mode: table(lambda costs, m=mode: costs.saved_bytes[m]) for mode in modes},
            passing={
                mode: table(lambda costs, m=mode: costs.extra_bytes[m] + costs.transient_bytes)
                for mode in modes
            },
            own=table(lambda costs: costs.own_elements),
            experts=table(lambda costs: costs.expert_elements),
            replicated=table(lambda costs: costs.replicated_elements),
            received=received[sorted({*twins[1:]})].min(axis=0) if len(twins) > 1 else np.zeros(len(order)),
            shared=of_parts(sum(shared.values()) for _, _, shared in parts),
            uses=of_parts(
                sum(
                    number * costs.shared_elements(shared) for number, costs in zip(whole, kinds, strict=True)
                )
                for _, kinds, shared in parts
            ),
        )
