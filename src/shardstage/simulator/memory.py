"""``memory_of``: what a simulated rank holds after each of its instructions, and what makes up its peak.

between steps   parameters, master, gradients, optimizer
UNSHARD         + the stage's parameters                                             − at RESHARD
RECV            + its message, from when it is posted, two computations ahead        − when the gradient has been sent back
F               + what the microbatch saves; transient while it runs                 − at B or W, at I down to what W needs
B, I            transient and recomputed tensors, gathered blocks while it runs
STEP            + the copy of a bucket's part that ZeRO-1 gathers from
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from shardstage.program import Instruction, Program
from shardstage.simulator.allocator import Allocation
from shardstage.simulator.holdings import Holdings, StageHolding
from shardstage.simulator.lanes import Lane
from shardstage.timeline import MemorySample

__all__ = ["Holder", "RankMemory", "memory_of"]

POSTED_COMPUTATIONS = 2
"""The engine posts the receives of so many computations ahead."""


class Holder(NamedTuple):
    """Something that is held, and its bytes."""

    what: str
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """``samples`` in order of time; ``holders`` are what is held at the peak, the biggest first; ``trace`` is what is allocated and freed
    in order, what a microbatch saves value by value."""

    samples: tuple[MemorySample, ...]
    holders: tuple[Holder, ...]
    trace: tuple[Allocation, ...]

    @property
    def peak_bytes(self) -> int:
        return max(sample.total_bytes for sample in self.samples)


def memory_of(
    program: Program, lane: Lane, holdings: Holdings, starts_s: Sequence[float], ends_s: Sequence[float]
) -> RankMemory:
    """Two samples an instruction: while it runs, and after it."""
    replay = _Replay(program, lane, holdings)
    samples: list[MemorySample] = []
    peak_bytes, peak_live = -1, dict[tuple[str, str], int]()
    for position, (when, instruction) in enumerate(_moments(lane.instructions)):
        time_s = starts_s[position // 2] if when == "during" else ends_s[position // 2]
        replay.change(when, position // 2, instruction)
        if not samples or replay.totals != samples[-1].bytes_by_category:
            samples.append(MemorySample(lane.rank, time_s, dict(replay.totals), instruction.name))
        if replay.total_bytes > peak_bytes:
            peak_bytes, peak_live = replay.total_bytes, dict(replay.live)
    holders = tuple(_holders(replay, peak_live))
    return RankMemory(samples=tuple(samples), holders=holders, trace=tuple(replay.trace))


def _moments(instructions: Sequence[Instruction]) -> Iterator[tuple[str, Instruction]]:
    for instruction in instructions:
        yield "during", instruction
        yield "after", instruction


class _Replay:
    """``live`` are bytes by (category, what), ``totals`` by category."""

    def __init__(self, program: Program, lane: Lane, holdings: Holdings) -> None:
        self.program = program
        self.lane = lane
        self.holdings = holdings
        self.live: dict[tuple[str, str], int] = {}
        self.totals: Counter[str] = Counter()
        self.total_bytes = 0
        self.trace: list[Allocation] = []
        self._parts: dict[str, tuple[str, ...]] = {}
        self._row = lane.instructions
        self._posted_until = 0
        self._received: dict[tuple[int, int], list[tuple[str, str]]] = {}
        self._rank = holdings.rank(lane.rank)
        for category in ("parameters", "master", "gradients", "optimizer"):
            self._hold(category, category, getattr(self._rank, category))

    def change(self, when: str, position: int, instruction: Instruction) -> None:
        is_begin = when == "during"
        if is_begin:
            self._post(position)
        stage, microbatch, kind = instruction.stage, instruction.microbatch, instruction.kind
        if kind == "STEP":
            self._hold_while(is_begin, "communication", "the part of a bucket", self._rank.step_bytes)
        elif kind == "UNSHARD" and is_begin and stage is not None:
            self._hold("parameters", f"unsharded stage {stage}", self._rank.unsharded.get(stage, 0))
        elif kind == "RESHARD" and not is_begin:
            self._free("parameters", f"unsharded stage {stage}")
        elif instruction.is_computation and stage is not None and microbatch is not None:
            held = self.holdings.stage(self.lane.rank, stage, self.lane.sizes[microbatch])
            self._compute(is_begin, instruction, stage, microbatch, held)
        elif kind == "SEND_B" and not is_begin and stage is not None and microbatch is not None:
            self._free("activations", f"{stage}RECV_F{microbatch}<{instruction.peer}")

    def _compute(
        self, is_begin: bool, instruction: Instruction, stage: int, microbatch: int, held: StageHolding
    ) -> None:
        kind = instruction.kind
        activation = f"stage {stage} microbatch {microbatch}"
        self._hold_while(is_begin, "transient", instruction.name, held.transient_bytes)
        self._hold_while(is_begin, "parameters", instruction.name, held.gathered_bytes)
        if kind == "F":
            if is_begin:
                self._hold("activations", activation, held.saved_bytes, held.saved)
            return
        if kind != "W":
            self._hold_while(is_begin, "recompute", instruction.name, held.recompute_bytes)
            self._hold_while(is_begin, "gradients", instruction.name, held.unit_gradient_bytes)
        if is_begin:
            return
        if kind == "I":
            self._free("activations", activation)
            self._hold("activations", activation, held.deferred_bytes)
        else:
            self._free("activations", activation)
        gradients = f"gradients of stage {stage}"
        if kind != "I" and ("gradients", gradients) not in self.live:
            self._hold("gradients", gradients, self._rank.made_gradients.get(stage, 0))
        if kind != "W":
            self._release_received(stage, microbatch)

    def _release_received(self, stage: int, microbatch: int) -> None:
        """Gradients that have been used, and values that none goes back for: those that one does go when it is sent."""
        for category, name in self._received.pop((stage, microbatch), []):
            if category == "communication" or not self._has_gradient(stage, name):
                self._free(category, name)

    def _has_gradient(self, stage: int, name: str) -> bool:
        peer = int(name.rpartition("<")[2])
        return any(edge.requires_grad for edge in self.program.edges_between(peer, stage))

    def _post(self, position: int) -> None:
        """Buffers of the receives up to the second computation from here."""
        ahead = _ahead(self._row, position, self._posted_until)
        for instruction in self._row[self._posted_until : ahead]:
            stage, microbatch = instruction.stage, instruction.microbatch
            if instruction.is_receive and stage is not None and microbatch is not None:
                category = "activations" if instruction.kind == "RECV_F" else "communication"
                num_bytes = sum(tensor.num_bytes for tensor in self.program.tensors(instruction))
                self._hold(category, instruction.name, num_bytes)
                self._received.setdefault((stage, microbatch), []).append((category, instruction.name))
        self._posted_until = max(self._posted_until, ahead)

    def _hold_while(self, is_begin: bool, category: str, what: str, num_bytes: int) -> None:
        if is_begin:
            self._hold(category, what, num_bytes)
        else:
            self._free(category, what)

    def _hold(self, category: str, what: str, num_bytes: int, parts: Sequence[tuple[str, int]] = ()) -> None:
        """``parts`` are the tensors that it consists of, where they are known."""
        if not num_bytes:
            return
        self.live[category, what] = num_bytes
        self.totals[category] += num_bytes
        self.total_bytes += num_bytes
        name = f"{category}: {what}"
        made = [Allocation(f"{name}: {part}", size) for part, size in parts or (("", num_bytes),) if size]
        self._parts[name] = tuple(allocation.name for allocation in made)
        self.trace += made

    def _free(self, category: str, what: str) -> None:
        num_bytes = self.live.pop((category, what), 0)
        self.totals[category] -= num_bytes
        self.total_bytes -= num_bytes
        self.trace += [Allocation(part, 0) for part in self._parts.pop(f"{category}: {what}", ())]


def _ahead(row: Sequence[Instruction], position: int, known: int) -> int:
    """Where the second computation from ``position`` is, or the end."""
    computations, at = 0, position
    while at < len(row):
        computations += row[at].is_computation
        at += 1
        if computations == POSTED_COMPUTATIONS:
            return at
    return max(at, known)


def _holders(replay: _Replay, live: dict[tuple[str, str], int]) -> list[Holder]:
    """The live things, activations by value over the microbatches that hold it."""
    found: Counter[str] = Counter()
    held_by_stage: dict[int, list[int]] = {}
    for (category, what), num_bytes in live.items():
        if category == "activations" and what.startswith("stage "):
            _, number, _, held = what.split()
            held_by_stage.setdefault(int(number), []).append(int(held))
        elif what == category or what.startswith("gradients of stage"):
            found[category] += num_bytes
        else:
            found[f"{category} of {what}"] += num_bytes
    for stage, microbatches in held_by_stage.items():
        shown = f"{microbatches[0]}" if len(microbatches) == 1 else f"{microbatches[0]}…{microbatches[-1]}"
        whole: Counter[str] = Counter()
        for microbatch in microbatches:
            live_bytes = live["activations", f"stage {stage} microbatch {microbatch}"]
            holding = replay.holdings.stage(replay.lane.rank, stage, replay.lane.sizes[microbatch])
            values = holding.saved if live_bytes == holding.saved_bytes else (("put off to W", live_bytes),)
            whole.update(dict(values))
        for name, num_bytes in whole.items():
            found[f"{name} of stage {stage}, microbatches {shown}"] += num_bytes
    return [Holder(what, num_bytes) for what, num_bytes in found.most_common()]
