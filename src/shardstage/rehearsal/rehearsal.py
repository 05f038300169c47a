"""``Rehearsal``: what trying out a plan has shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shardstage.plan import Plan
from shardstage.program import Program
from shardstage.rehearsal.counts import Counts
from shardstage.rehearsal.stored import Stored
from shardstage.runtime.dry_run_compare import Difference
from shardstage.runtime.dry_run_memory import HeldTensors
from shardstage.simulator import Holder
from shardstage.timeline import Timeline

__all__ = ["RankRehearsal", "Rehearsal"]


@dataclass(frozen=True, kw_only=True)
class RankRehearsal:
    """One rank, which stands for the ``alike``, itself included: what it holds at its peak, in bytes by category, and at which act.

    ``largest`` are the biggest things held then: tensors where the rank was executed (``is_executed``), else what the simulator counts.
    ``difference`` is the first thing that the engine did otherwise than the Program says. ``predicted_bytes`` is the simulator's peak.
    """

    rank: int
    alike: tuple[int, ...]
    stages: tuple[int, ...]
    act: str
    held: Mapping[str, int]
    predicted_bytes: int
    largest: Sequence[HeldTensors | Holder] = ()
    is_executed: bool = False
    num_microbatches: int = 0
    num_executed: int = 0
    difference: Difference | None = None
    stored: Stored | None = None

    @property
    def peak_bytes(self) -> int:
        return sum(self.held.values())


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """A proved Program, its predicted timeline, and each kind of rank (or each rank) in order."""

    plan: Plan
    program: Program
    counts: Counts
    timeline: Timeline
    ranks: tuple[RankRehearsal, ...]

    @property
    def fullest(self) -> RankRehearsal:
        """The first rank that holds most."""
        return max(self.ranks, key=lambda rank: rank.peak_bytes)

    @property
    def differences(self) -> tuple[Difference, ...]:
        """Where the engine did otherwise than the Program says; none if all is well."""
        return tuple(rank.difference for rank in self.ranks if rank.difference is not None)

    @property
    def stored_bytes(self) -> int | None:
        """Bytes of a checkpoint of all ranks, each element once; ``None`` where not every kind of rank was executed."""
        found = [rank.stored for rank in self.ranks]
        if any(stored is None for stored in found):
            return None
        num_bytes: dict[str, int] = {}
        for stored in found:
            assert stored is not None
            num_bytes |= stored.whole_bytes
        return sum(num_bytes.values())
