"""Receives in the order of sending: what two ranks send each other arrives as it left.

    sends       0SEND_F0>1  0SEND_F0>2  0SEND_F1>1           stages 1 and 2 are of one rank, and 2 is reached by a skip
    needed      1RECV_F0<0  1RECV_F1<0  2RECV_F0<0
    received    1RECV_F0<0  2RECV_F0<0  1RECV_F1<0

Transports that match messages by order (NCCL) would mix them up otherwise. A receive that moves forward so waits for nothing new: what it
receives was sent before that which the next one waits for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from shardstage.program.instruction import Instruction, InstructionKind

__all__ = ["in_order_of_sending"]

Way = tuple[int, int, str]
"""From a pipeline rank to another, F or B."""

_RECEIVE: Mapping[InstructionKind, InstructionKind] = {"SEND_F": "RECV_F", "SEND_B": "RECV_B"}


def in_order_of_sending(
    row: Sequence[Instruction], peers: Sequence[Sequence[Instruction]], stage_ranks: Sequence[int]
) -> tuple[Instruction, ...]:
    """A row with its receives in the order in which ``peers[source]``, all rows of its pipeline, send to it."""
    receives = {_key(i): i for i in row if i.is_receive}
    coming = {
        (source, letter): [key for key in _sent(sender, letter) if key in receives]
        for source, sender in enumerate(peers)
        for letter in "FB"
    }
    done: set[tuple[InstructionKind, int | None, int | None, int | None]] = set()
    found: list[Instruction] = []
    for i in row:
        if not i.is_receive:
            found.append(i)
        elif _key(i) not in done:
            assert i.peer is not None
            way = coming[stage_ranks[i.peer], i.kind[-1]]
            before = way[: way.index(_key(i)) + 1]
            found += [receives[key] for key in before if key not in done]
            done.update(before)
    return tuple(found)


def _key(i: Instruction) -> tuple[InstructionKind, int | None, int | None, int | None]:
    return i.kind, i.stage, i.microbatch, i.peer


def _sent(
    row: Sequence[Instruction], letter: str
) -> Iterator[tuple[InstructionKind, int | None, int | None, int | None]]:
    """The receives of what a row sends, in order."""
    for i in row:
        if i.is_send and i.kind.endswith(letter):
            yield _RECEIVE[i.kind], i.peer, i.microbatch, i.stage
