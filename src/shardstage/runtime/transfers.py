"""What travels between stages: activations forwards, their gradients backwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from shardstage.program import Instruction, Program
from shardstage.runtime.groups import RankGroups

__all__ = ["Transfers", "early_receives"]


def early_receives(row: Sequence[Instruction], position: int) -> Iterator[Instruction]:
    """The receives that are begun at ``position`` at the latest: those up to the second computation from there."""
    computations = 0
    for at in range(position, len(row)):
        if row[at].is_receive:
            yield row[at]
        computations += row[at].is_computation
        if computations == 2:
            return


class Transfers:
    """Sends and receives the messages of a Program, each value under a tag of its own, so that no order of arrival can mix them up.

    Receives are posted early (``post``) and waited for when needed; a sent tensor is kept alive until ``has_left`` says that it has
    left.
    """

    def __init__(self, program: Program, groups: RankGroups, device: torch.device) -> None:
        self._program = program
        self._groups = groups
        self._device = device
        self.has_left: Callable[[dist.Work], bool] = dist.Work.is_completed
        self._edge_number = {(e.value, e.source, e.target): i for i, e in enumerate(program.edges)}
        self._incoming: dict[Instruction, list[tuple[str, Tensor, dist.Work]]] = {}
        self._outgoing: list[tuple[dist.Work, Tensor]] = []

    def values(self, instruction: Instruction) -> tuple[str, ...]:
        """Names of the values that a SEND or RECV moves, in order."""
        return tuple(tensor.value for tensor in self._program.tensors(instruction))

    def post(self, instruction: Instruction) -> None:
        """Begins a RECV into buffers of the shapes that its message has. Posting again does nothing."""
        if instruction in self._incoming:
            return
        arriving = []
        for tensor in self._program.tensors(instruction):
            buffer = torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype), device=self._device)
            work = dist.irecv(
                buffer,
                src=self._peer(instruction),
                group=self._group(instruction),
                tag=self._tag(instruction, tensor.value),
            )
            assert work is not None
            arriving.append((tensor.value, buffer, work))
        self._incoming[instruction] = arriving

    def receive(self, instruction: Instruction) -> dict[str, Tensor]:
        """The values of a posted RECV, when they are here."""
        arrived = {}
        for name, buffer, work in self._incoming.pop(instruction):
            work.wait()
            arrived[name] = buffer
        return arrived

    def send(self, instruction: Instruction, tensors: Sequence[Tensor]) -> None:
        """Begins a SEND of the values in order."""
        self._outgoing = [(work, tensor) for work, tensor in self._outgoing if not self.has_left(work)]
        for name, tensor in zip(self.values(instruction), tensors, strict=True):
            sent = tensor.contiguous()
            work = dist.isend(
                sent,
                dst=self._peer(instruction),
                group=self._group(instruction),
                tag=self._tag(instruction, name),
            )
            assert work is not None
            if not self.has_left(work):
                self._outgoing.append((work, sent))

    def flush(self) -> None:
        """Returns when everything sent has left."""
        for work, _ in self._outgoing:
            work.wait()
        self._outgoing.clear()

    def _peer(self, instruction: Instruction) -> int:
        assert instruction.peer is not None
        return self._groups.peer(self._program.stage_ranks[instruction.peer])

    def _group(self, instruction: Instruction) -> dist.ProcessGroup | None:
        return self._groups.forward_group if instruction.kind.endswith("F") else self._groups.backward_group

    def _tag(self, instruction: Instruction, value: str) -> int:
        stage, peer = instruction.stage, instruction.peer
        assert instruction.microbatch is not None and stage is not None and peer is not None
        source, target = (stage, peer) if instruction.kind in ("SEND_F", "RECV_B") else (peer, stage)
        number = self._edge_number[value, source, target]
        return number * self._program.num_microbatches + instruction.microbatch
