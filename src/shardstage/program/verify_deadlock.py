"""No deadlock: the ranks run on paper until all have ended or none can go on.

    RECV          waits until its SEND has begun
    SEND          begins and goes on: what is sent is kept until it has left, at the end of the step (``Transfers.flush``)
    collective    waits until every rank of its group has come to it

A SEND that waited until its receive is posted would forbid looped and V-shaped schedules, in which two ranks send to each other in turn;
that messages between two ranks arrive in the order in which they leave is what ``check_message_order`` proves instead. What a rank waits
for never depends on the order in which others run, so that any order of trying them finds the same end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from shardstage.errors import ProgramError
from shardstage.program.instruction import Instruction
from shardstage.program.verify_fold import Fold
from shardstage.program.verify_grid import Track, draw

__all__ = ["check_deadlock"]

Member = tuple[int, int]
"""A kind of column and a pipeline rank."""


class _Wait(NamedTuple):
    """For whom a rank waits, at which step, with what."""

    step: int
    what: str
    others: tuple[Member, ...]


class _Rank:
    """How far a rank is: the step it is at, the collectives of that step it has done, those it has come to by axis."""

    def __init__(self, instructions: Sequence[Instruction]) -> None:
        self.instructions = instructions
        self.step = 0
        self.num_done = 0
        self.come_to: dict[str, int] = {}
        self.is_at_collective = False


def check_deadlock(fold: Fold) -> None:
    """Raises with the ranks that wait for each other, where they stand, and who waits for whom."""
    waits = _Lockstep(fold).run()
    if waits:
        raise _deadlock(fold, waits)


class _Lockstep:
    def __init__(self, fold: Fold) -> None:
        self._fold = fold
        self._program = fold.program
        self._ranks = {
            (kind, pp): _Rank(row.instructions)
            for kind, column in enumerate(fold.columns)
            for pp, row in enumerate(column.rows)
        }
        self._waiting: dict[Member, set[Member]] = {member: set() for member in self._ranks}

    def run(self) -> Mapping[Member, _Wait]:
        """Who waits for what at the end; empty if all have ended."""
        waits: dict[Member, _Wait] = {}
        todo = deque(self._ranks)
        while todo:
            member = todo.popleft()
            rank = self._ranks[member]
            before = (rank.step, rank.num_done, rank.is_at_collective)
            wait = self._advance(member, rank)
            waits.pop(member, None)
            if wait is not None:
                waits[member] = wait
                for other in wait.others:
                    self._waiting[other].add(member)
            if before != (rank.step, rank.num_done, rank.is_at_collective):
                todo.extend(self._waiting[member])
                self._waiting[member].clear()
        return waits

    def _advance(self, member: Member, rank: _Rank) -> _Wait | None:
        """Goes on until the rank must wait or has ended."""
        while rank.step < len(rank.instructions):
            instruction = rank.instructions[rank.step]
            wait = self._receive(member, rank, instruction) or self._collectives(member, rank, instruction)
            if wait is not None:
                return wait
            rank.step += 1
            rank.num_done = 0
        return None

    def _receive(self, member: Member, rank: _Rank, instruction: Instruction) -> _Wait | None:
        if not instruction.is_receive:
            return None
        kind, column = member[0], self._fold.columns[member[0]]
        assert instruction.peer is not None
        other = (kind, self._program.stage_ranks[instruction.peer])
        partner = "SEND_F" if instruction.kind == "RECV_F" else "SEND_B"
        at = column.step_of[partner, instruction.peer, instruction.microbatch, instruction.stage]
        peer = self._ranks[other]
        if peer.step >= at:
            return None
        return _Wait(rank.step, f"{instruction.name} for {peer.instructions[at].name}", (other,))

    def _collectives(self, member: Member, rank: _Rank, instruction: Instruction) -> _Wait | None:
        calls = self._program.collectives(instruction)
        while rank.num_done < len(calls):
            axis = calls[rank.num_done].axis
            members = self._fold.members(*member, axis)
            if not rank.is_at_collective:
                rank.come_to[axis] = rank.come_to.get(axis, 0) + 1
                rank.is_at_collective = True
            turn = rank.come_to[axis]
            late = tuple(m for m in members if self._ranks[m].come_to.get(axis, 0) < turn)
            if late:
                return _Wait(rank.step, f"{axis}.{calls[rank.num_done].kind} of {instruction.name}", late)
            rank.is_at_collective = False
            rank.num_done += 1
        return None


def _deadlock(fold: Fold, waits: Mapping[Member, _Wait]) -> ProgramError:
    """The error of a cycle: from any rank that waits, on to one it waits for, until one comes again."""
    path = [next(iter(waits))]
    while True:
        following = next(other for other in waits[path[-1]].others if other in waits)
        if following in path:
            break
        path.append(following)
    cycle = path[path.index(following) :]
    lines = [
        f"{_where(fold, member)}, step {waits[member].step}: waits with {waits[member].what} of "
        f"{_where(fold, other)}"
        for member, other in zip(cycle, [*cycle[1:], cycle[0]], strict=True)
    ]
    first = waits[cycle[0]]
    name = fold.columns[cycle[0][0]].rows[cycle[0][1]].instructions[first.step].name
    return ProgramError(
        "deadlock: " + "\n".join(lines) + "\n" + draw(_tracks(fold, waits, cycle)),
        hint=f"move {name} of {_where(fold, cycle[0])} away from step {first.step}",
    )


def _where(fold: Fold, member: Member) -> str:
    kind, pp = member
    return fold.columns[kind].where(pp)


def _tracks(fold: Fold, waits: Mapping[Member, _Wait], cycle: Sequence[Member]) -> list[Track]:
    """The pipeline around the cycle, and its ranks elsewhere; step 0 is where all stand still."""
    kind = cycle[0][0]
    shown = {*cycle, *((kind, pp) for pp in range(fold.program.mesh.pp))}
    tracks = []
    for member in sorted(shown, key=lambda m: fold.columns[m[0]].rank(m[1])):
        column, pp = fold.columns[member[0]], member[1]
        instructions = column.rows[pp].instructions
        stop = waits[member].step if member in waits else len(instructions)
        tracks.append(
            Track(
                rank=column.rank(pp),
                instructions=instructions,
                times=[step - stop for step in range(len(instructions))],
                marked=stop if member in cycle else None,
            )
        )
    return tracks
