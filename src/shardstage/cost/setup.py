"""``StepSetup``: what the price of a step depends on besides the model and the cluster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shardstage.cost.profile import Profile, Recompute
from shardstage.layout import Mesh
from shardstage.units import dtype_bytes

__all__ = ["StepSetup"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSetup:
    """``starts`` are the first units of the stages; the other fields are those of a plan.

    ``microbatch`` is the size that the profile was made at, and ``num_microbatches`` run on each data-parallel rank.
    """

    mesh: Mesh
    starts: tuple[int, ...]
    microbatch: int
    num_microbatches: int
    global_batch: int
    sequence: int | None
    zero: int
    recompute: Recompute
    schedule: Literal["gpipe", "1f1b"]
    precision: str
    bucket_bytes: int

    @property
    def sharding_level(self) -> int:
        """The ZeRO level that has an effect: none with a single data-parallel rank."""
        return self.zero if self.mesh.dp > 1 else 0

    @property
    def compute_bytes(self) -> int:
        """Bytes of one parameter as it is computed with."""
        return dtype_bytes(self.precision)

    @property
    def master_bytes(self) -> int:
        """Bytes of one gradient, of one moment and of one master weight: float32, or wider where computation is."""
        return max(4, self.compute_bytes)

    def units_of(self, stage: int, profile: Profile) -> range:
        """Indices of the units of a stage."""
        stops = (*self.starts[1:], len(profile.units))
        return range(self.starts[stage], stops[stage])

    def in_flight(self, stage: int) -> int:
        """Microbatches whose activations a stage holds at most: all under GPipe, one for each stage from here to the end under 1F1B."""
        if self.schedule == "gpipe":
            return self.num_microbatches
        return min(self.mesh.pp - stage, self.num_microbatches)
