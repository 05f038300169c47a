"""``acts_of``: the instructions of a lane with their prices, as the small tuples that the simulation walks.

Compute   seconds, then exposed_s of collectives inside, at which the lanes of ``group`` wait for each other
Send      core_s, then own_s, then the message leaves when the link to ``peer`` is free, and is there bytes_s + latency_s later
Receive   waits for message ``key``, then core_s and own_s
Talk      collectives one after the other: (group, seconds, stream); group ALONE waits for nobody
Reduce    buckets: (position of the last backward of their stage, share of it after which they are whole, seconds)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import attrgetter
from typing import Final, NamedTuple

from shardstage.cost.links import exposed_s
from shardstage.program import Collective, Instruction, Program
from shardstage.simulator.lanes import Lane, Lanes
from shardstage.simulator.periods import Cut
from shardstage.simulator.prices import Prices, Wire
from shardstage.timeline import Stream

__all__ = [
    "ALONE",
    "COMPUTE",
    "RECEIVE",
    "REDUCE",
    "SEND",
    "TALK",
    "Act",
    "Departure",
    "Pricer",
    "Reduction",
    "Talk",
]

COMPUTE: Final = 0
SEND: Final = 1
RECEIVE: Final = 2
TALK: Final = 3
REDUCE: Final = 4
ALONE: Final = -1


class Talk(NamedTuple):
    """One collective that a lane waits for, or seconds of its own (group ``ALONE``)."""

    group: int
    seconds: float
    stream: Stream


class Departure(NamedTuple):
    """The lane that a message leaves for, and what sending it takes of shared cores."""

    target: int
    core_s: float


class Bucket(NamedTuple):
    """One reduction that may begin under a backward: of instruction ``position``, when ``share`` of it is done.

    ``seconds`` are at that backward's pace (``Prices.pace``), so that what hides is what hid before a calibration.
    """

    position: int
    share: float
    seconds: float


class Reduction(NamedTuple):
    """What REDUCE_GRAD waits for: buckets over dp, then what is partial over tp and ties.

    ``weight`` is what a calibration makes of the seconds that buckets take longer than the backward beside them.
    """

    group: int
    buckets: tuple[Bucket, ...]
    after: tuple[Talk, ...]
    weight: float


Act = tuple[int, float, float, float, int, object]
"""(kind, own or compute seconds, latency or exposed seconds, seconds on the link, group or message or link, more)."""

_key_of = attrgetter("stage", "kind", "peer", "message", "calls")


class Pricer:
    """Turns instructions of lanes into acts; numbers groups of lanes and messages."""

    def __init__(self, program: Program, lanes: Lanes, prices: Prices) -> None:
        self._program = program
        self._lanes = lanes
        self._prices = prices
        self._groups: dict[tuple[int, ...], int] = {}
        self._messages: dict[tuple[object, ...], int] = {}
        self._stages_of = {p.fqn: p.stages for p in program.parameters}

    @property
    def group_sizes(self) -> dict[int, int]:
        """How many lanes meet in each group, by its number."""
        return {number: len(members) for members, number in self._groups.items()}

    def acts_of(self, lane: Lane, instructions: Sequence[Instruction], cut: Cut | None = None) -> list[Act]:
        """One act for each instruction of the lane, but for those that are ``cut`` out: later microbatches then have smaller numbers."""
        if cut is None:
            return self._acts(lane, instructions, instructions, 0)
        before, after = instructions[: cut.at], instructions[cut.stop :]
        row = (*before, *after)
        return [
            *self._acts(lane, before, row, 0),
            *self._acts(lane, after, row, cut.num_microbatches),
        ]

    def _acts(
        self, lane: Lane, instructions: Sequence[Instruction], row: Sequence[Instruction], shift: int
    ) -> list[Act]:
        known: dict[tuple[object, ...], Act] = {}
        acts: list[Act] = []
        sizes, prices_of_size = lane.sizes, len(set(lane.sizes)) > 1
        for instruction in instructions:
            microbatch = instruction.microbatch
            key = _key_of(instruction)
            if prices_of_size and microbatch is not None:
                key = (*key, sizes[microbatch])
            act = known.get(key)
            if act is None:
                act = known[key] = self._act(lane, instruction, row)
            if act[0] == SEND or act[0] == RECEIVE:
                assert microbatch is not None
                act = (act[0], act[1], act[2], act[3], act[4] + microbatch - shift, act[5])
            acts.append(act)
        return acts

    def _act(self, lane: Lane, instruction: Instruction, row: Sequence[Instruction]) -> Act:
        match instruction.kind:
            case "F" | "B" | "I" | "W":
                return self._computation(lane, instruction)
            case "SEND_F" | "SEND_B" | "RECV_F" | "RECV_B":
                return self._transfer(lane, instruction)
            case "REDUCE_GRAD":
                return (
                    REDUCE,
                    self._own_s(lane, instruction),
                    0.0,
                    0.0,
                    ALONE,
                    self._reduction(lane, instruction, row),
                )
            case _:
                return (TALK, 0.0, 0.0, 0.0, ALONE, tuple(self._talks(lane, instruction)))

    def _own_s(self, lane: Lane, instruction: Instruction, num_bytes: int = 0) -> float:
        return self._prices.own_s(lane.rank, instruction.kind, instruction.stage, num_bytes)

    def _computation(self, lane: Lane, instruction: Instruction) -> Act:
        stage, microbatch = instruction.stage, instruction.microbatch
        assert stage is not None and microbatch is not None
        seconds = self._prices.compute_s(lane.rank, stage, instruction.kind, lane.sizes[microbatch])
        calls = self._program.collectives(instruction)
        over_tp = [self._wire(lane, call) for call in calls if call.axis != "dp"]
        over_dp = [call for call in calls if call.axis == "dp"]
        talk_s = sum(wire.seconds for wire in over_tp)
        waits_s = talk_s
        if over_dp:
            pace = self._pace(lane, instruction)
            beside_s = seconds + pace * sum(wire.formula_s for wire in over_tp)
            waits_s += self._waits_s(lane, instruction, over_dp, beside_s, pace)
        group = self._widest_group(lane, {call.axis for call in calls})
        return (COMPUTE, seconds, waits_s, talk_s, group, instruction)

    def _waits_s(
        self, lane: Lane, instruction: Instruction, calls: Sequence[Collective], beside_s: float, pace: float
    ) -> float:
        """Seconds that gathers and sums over dp add to the compute and the talk along tp that they run ``beside``, but for the ``bare``."""
        talks = [pace * self._wire(lane, call).formula_s for call in calls]
        bare_s = sum(talks[self._bare(lane, instruction, calls)])
        added_s = exposed_s(sum(talks), beside_s, self._prices.overlap_slowdown, bare_s)
        return self._wire(lane, calls[0]).factor / pace * added_s

    def _bare(self, lane: Lane, instruction: Instruction, calls: Sequence[Collective]) -> slice:
        """Which of a computation's ``calls`` over dp begin or end it: no compute is there to run beside.

        Of a forward the first gather; that of a backward runs beside the last block of the forward before it, since FSDP2 only waits until
        that has its parameters. Of a backward the sum of what its stage gathers first, and those behind it: of the first block, which
        ends it, or of what several blocks use, when it is over, and then of a first block that only reads tokens (FSDP2's final callback).
        """
        sums = [at for at, call in enumerate(calls) if call.kind == "reduce_scatter"]
        if not sums:
            return slice(0, 1)
        gathered = (
            call.bucket
            for other in lane.instructions
            if other.stage == instruction.stage
            for call in self._program.collectives(other)
            if call.kind == "all_gather" and call.axis == "dp"
        )
        first = next(gathered, "")
        return slice(next((at for at in sums if calls[at].bucket == first), sums[-1]), None)

    def _widest_group(self, lane: Lane, axes: Iterable[str]) -> int:
        """The group that has most lanes; ``ALONE`` if all ranks of all groups are alike."""
        widest = max((self._lanes.members(lane, axis) for axis in axes), key=len, default=())
        return self._groups.setdefault(widest, len(self._groups)) if len(widest) > 1 else ALONE

    def _transfer(self, lane: Lane, instruction: Instruction) -> Act:
        program, lanes = self._program, self._lanes
        stage, peer = instruction.stage, instruction.peer
        assert stage is not None and peer is not None
        num_bytes = sum(tensor.num_bytes for tensor in program.tensors(instruction))
        own_s = self._own_s(lane, instruction, num_bytes)
        ends = (stage, peer) if instruction.is_send else (peer, stage)
        coordinates = (lane.dp_class, lane.tp_class)
        other = lanes.at(program.stage_ranks[peer], *coordinates)
        source, target = (lane, other) if instruction.is_send else (other, lane)
        wire = self._prices.transfer(num_bytes, source.rank, target.rank)
        number = self._messages.setdefault((ends, instruction.kind[-1], *coordinates), len(self._messages))
        first_key = number * program.num_microbatches
        if instruction.is_receive:
            return (RECEIVE, own_s, 0.0, 0.0, first_key, wire.core_s)
        departure = Departure(target.number, wire.core_s)
        return (SEND, own_s, wire.latency_s, wire.bytes_s, first_key, departure)

    def _talks(self, lane: Lane, instruction: Instruction) -> Iterator[Talk]:
        """COUNT, UNSHARD and STEP: the norm of all gradients, then the update, then what is gathered."""
        calls = self._program.collectives(instruction)
        own = Talk(ALONE, self._own_s(lane, instruction), "compute")
        first = [call for call in calls if call.axis == "world"]
        yield from (self._talk(lane, call) for call in first)
        if own.seconds:
            yield own
        yield from (self._talk(lane, call) for call in calls if call.axis != "world")

    def _talk(self, lane: Lane, call: Collective) -> Talk:
        stream: Stream = "tp" if call.axis == "tp" else "dp"
        return Talk(self._widest_group(lane, (call.axis,)), self._seconds(lane, call), stream)

    def _seconds(self, lane: Lane, call: Collective) -> float:
        return self._wire(lane, call).seconds

    def _wire(self, lane: Lane, call: Collective) -> Wire:
        return self._prices.collective(call, self._lanes.group(lane, call.axis))

    def _pace(self, lane: Lane, computation: Instruction) -> float:
        stage, microbatch = computation.stage, computation.microbatch
        assert stage is not None and microbatch is not None
        return self._prices.pace(lane.rank, stage, computation.kind, lane.sizes[microbatch])

    def _reduction(self, lane: Lane, instruction: Instruction, row: Sequence[Instruction]) -> Reduction:
        calls = self._program.collectives(instruction)
        buckets = [call for call in calls if call.axis == "dp"]
        last = {i.stage: at for at, i in enumerate(row) if i.kind in ("B", "W")}
        pace = self._pace(lane, row[max(last.values())]) if buckets and last else 1.0
        weight = self._wire(lane, buckets[0]).factor / pace if buckets else 1.0
        found: list[Bucket] = []
        for stage, of_stage in groupby(buckets, key=lambda call: self._stage_of(lane, call)):
            calls_of_stage = list(of_stage)
            total, done = sum(call.num_bytes for call in calls_of_stage), 0
            for call in calls_of_stage:
                done += call.num_bytes
                position = max(last.values(), default=0) if stage is None else last[stage]
                share = 1.0 if stage is None else done / max(1, total)
                found.append(Bucket(position, share, pace * self._wire(lane, call).formula_s))
        after = tuple(self._talk(lane, call) for call in calls if call.axis != "dp")
        return Reduction(self._widest_group(lane, ("dp",)), tuple(found), after, weight)

    def _stage_of(self, lane: Lane, call: Collective) -> int | None:
        """The stage of the rank whose last backward fills a bucket, ``None`` where several do: it starts when all are done."""
        own = set(self._program.stages_of(lane.pp))
        names = self._program.buckets.get(call.bucket, ())
        stages = own.intersection(*(self._stages_of[name] for name in names[:1]))
        return next(iter(stages)) if len(stages) == 1 else None
