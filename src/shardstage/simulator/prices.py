"""``Prices``: what the simulator asks: seconds of a computation, of a collective, of a message, of what a rank does besides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from shardstage.program import Collective
from shardstage.program.instruction import InstructionKind

__all__ = ["PriceTable", "Prices", "Wire"]


class Wire(NamedTuple):
    """What talking takes: ``latency_s`` until the first byte is there, ``bytes_s`` during which the link is taken.

    ``factor`` is what a calibration multiplies waiting for it by: all of it where nothing runs beside it, else what does not hide.
    ``core_s`` is what sending a message takes of the cores that ranks share, and receiving it as much.
    """

    latency_s: float
    bytes_s: float
    factor: float = 1.0
    core_s: float = 0.0

    @property
    def formula_s(self) -> float:
        """Before the calibration."""
        return self.latency_s + self.bytes_s

    @property
    def seconds(self) -> float:
        """Waited for from its beginning."""
        return self.factor * self.formula_s


class Prices(Protocol):
    """Seconds on one machine.

    ``slowdown``: a second in which compute and a message of a rank overlap does the work of 1 / slowdown seconds of each: 1 if they
    do not disturb each other, 2 if they take turns. ``overlap_slowdown``: seconds of compute that each second of a collective beside it
    adds (``cost.links``). ``num_cores``: the cores that all ranks share, each using one at most; ``None`` where each has its device.
    ``special_ranks`` cost other than their like; ``classes`` are the ranks of each class of devices, none where all are of one.
    """

    @property
    def slowdown(self) -> float: ...
    @property
    def overlap_slowdown(self) -> float: ...
    @property
    def num_cores(self) -> float | None: ...
    @property
    def special_ranks(self) -> tuple[int, ...]: ...
    @property
    def classes(self) -> tuple[range, ...]: ...
    @property
    def levels(self) -> tuple[str, ...]:
        """Names of the link levels, innermost first; none where nothing is known of them."""
        ...

    def level_of(self, group: Sequence[int]) -> str:
        """Name of the outermost link level that a group crosses."""
        ...

    def compute_s(self, rank: int, stage: int, kind: InstructionKind, size: int) -> float:
        """Seconds of F, B, I or W of ``stage`` on a microbatch of ``size`` samples, its collectives left out.

        Where ranks share cores: of a rank that has a core to itself.
        """
        ...

    def pace(self, rank: int, stage: int, kind: InstructionKind, size: int) -> float:
        """``compute_s`` over what it was before a calibration: in a race with it, collectives are as many times as long."""
        ...

    def collective(self, collective: Collective, group: Sequence[int]) -> Wire:
        """What one collective over the ranks of ``group`` takes from when the last of them is there."""
        ...

    def transfer(self, num_bytes: int, source: int, target: int) -> Wire:
        """What one message takes on the link from one rank to another, its calibration included."""
        ...

    def own_s(self, rank: int, kind: InstructionKind, stage: int | None, num_bytes: int) -> float:
        """Seconds of the rank's own compute stream in an instruction that does not compute: SEND and RECV of ``num_bytes``, STEP, …"""
        ...


@dataclass(frozen=True, kw_only=True)
class PriceTable:
    """Prices written down: seconds of computations by (stage, kind), one rate for all messages and one for all collectives.

    Computations take ``compute[stage, kind]`` seconds a sample. A collective over n ranks moves its bytes once at ``bytes_per_s``.
    ``message_s`` is what each end of a message takes of shared cores.
    """

    compute: Mapping[tuple[int, str], float]
    latency_s: float = 0.0
    bytes_per_s: float = float("inf")
    own: Mapping[str, float] = field(default_factory=dict)
    message_s: float = 0.0
    slowdown: float = 1.0
    num_cores: float | None = None
    special_ranks: tuple[int, ...] = ()
    classes: tuple[range, ...] = ()

    @property
    def overlap_slowdown(self) -> float:
        return self.slowdown - 1.0

    def compute_s(self, rank: int, stage: int, kind: InstructionKind, size: int) -> float:
        return size * self.compute[stage, kind]

    def pace(self, rank: int, stage: int, kind: InstructionKind, size: int) -> float:
        return 1.0

    def collective(self, collective: Collective, group: Sequence[int]) -> Wire:
        return Wire(self.latency_s, collective.num_bytes / self.bytes_per_s)

    def transfer(self, num_bytes: int, source: int, target: int) -> Wire:
        return Wire(self.latency_s, num_bytes / self.bytes_per_s, core_s=self.message_s)

    def own_s(self, rank: int, kind: InstructionKind, stage: int | None, num_bytes: int) -> float:
        return self.own.get(kind, 0.0)

    @property
    def levels(self) -> tuple[str, ...]:
        return ()

    def level_of(self, group: Sequence[int]) -> str:
        return ""
