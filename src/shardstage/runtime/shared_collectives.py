"""Collectives among the ranks of one host, as exchanges of slots of shared memory (see ``shared_memory``).

All tensors are contiguous, one-dimensional and on the CPU. A reduction adds in rank order, so all ranks get the same
bits, run after run; two-byte floats add up in fp32 and are rounded once. With n ranks, ``S`` bytes per slot:

    all_reduce, small or n = 2   tile by tile: copy the tile to my slot | exchange | everyone adds all slots
    all_reduce, large, n > 2     window by window: reduce_scatter the window, all_gather the window
    all_reduce, shared tensors   exchange | add my 1/n of all ranks' tensors, store it in all of them | exchange

A tensor that lies in an allocation of the group at the same offset on every rank is not copied through slots: the peers
read it, or write to it, where it lies. If only some ranks pass such a tensor, everyone starts over through slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import IntEnum
from itertools import pairwise

import torch

from shardstage.errors import ProgramError
from shardstage.runtime.collectives import Reduction, reduce_into
from shardstage.runtime.shared_memory import Allocation, SharedSegments

__all__ = ["SharedCollectives"]

_DIRECT_BYTES = 64 << 10  # up to here everyone adds everything, to save an exchange
_STREAM_BYTES = (
    1 << 20
)  # of a tile that everyone adds: short, so that it is still in the caches when it is read
_TILE_BYTES = 1 << 20  # a tile of every rank and the sum fit into a core's share of the caches

_DTYPES = (
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.complex128,
)  # fmt: skip

Place = tuple[Allocation, int]


class _Kind(IntEnum):
    ALL_REDUCE = 1
    REDUCE = 2
    ALL_GATHER = 3
    GATHER = 4
    REDUCE_SCATTER = 5
    BROADCAST = 6
    ALL_TO_ALL = 7
    SCATTER = 8
    BARRIER = 9


class SharedCollectives:
    """The collectives of one group. Every method blocks until this rank's part is done.

    Errors: those of ``SharedSegments``; ``ProgramError`` for a reduction that its dtype does not have.
    """

    def __init__(self, segments: SharedSegments) -> None:
        self._segments = segments
        self._rank = segments.rank
        self._size = segments.size
        self._slot_bytes = segments.options.slot_bytes

    def barrier(self) -> None:
        """Returns once every rank has called it."""
        self._segments.exchange(torch.uint8, _header(_Kind.BARRIER))

    def all_reduce(self, tensor: torch.Tensor, reduction: Reduction) -> None:
        """Replaces ``tensor`` [N] by the reduction over all ranks' tensors."""
        place = self._segments.place_of(tensor)
        header = _header(_Kind.ALL_REDUCE, reduction, tensor.dtype, tensor.numel(), place=place)
        if place is not None:
            if self._segments.exchange(torch.uint8, header) is not None:
                self._all_reduce_in_place(tensor, reduction, place)
                return
            header = None
        if self._size <= 2 or tensor.nbytes <= _DIRECT_BYTES:
            self._all_reduce_tiles(tensor, reduction, header)
        else:
            self._all_reduce_windows(tensor, reduction, header)

    def reduce(self, tensor: torch.Tensor, reduction: Reduction, root: int) -> None:
        """Replaces ``tensor`` [N] of ``root`` by the reduction over all ranks' tensors; the others' are unchanged."""
        header = _header(_Kind.REDUCE, reduction, tensor.dtype, tensor.numel(), root)
        self._all_reduce_tiles(tensor, reduction, header, has_result=self._rank == root)

    def all_gather(self, outputs: Sequence[torch.Tensor], tensor: torch.Tensor) -> None:
        """Fills ``outputs[rank]`` with that rank's ``tensor``; sizes may differ by rank, all ranks know all sizes."""
        num_bytes = [output.nbytes for output in outputs]
        if num_bytes[self._rank] != tensor.nbytes:
            raise ProgramError(
                f"all_gather: my tensor has {tensor.nbytes} bytes, but my output {num_bytes[self._rank]}",
                hint="the output for a rank must have the size of that rank's input",
            )
        place = self._segments.place_of(tensor)
        header = _header(_Kind.ALL_GATHER, 0, tensor.dtype, sum(num_bytes), place=place)
        self._gather(outputs, tensor, max(num_bytes), header, place)

    def all_gather_single(self, output: torch.Tensor, tensor: torch.Tensor) -> None:
        """Fills ``output`` [n * N] with the ranks' tensors [N] in rank order."""
        parts = self._parts_of(output, tensor)
        place = self._segments.place_of(output)
        if place is not None:
            parts[self._rank].copy_(tensor)
            header = _header(_Kind.ALL_GATHER, 0, tensor.dtype, output.nbytes, place=place, is_output=True)
            if self._segments.exchange(torch.uint8, header) is not None:
                self._pull_parts(parts, place)
                return
            self._gather(parts, tensor, tensor.nbytes, None, None)
            return
        self.all_gather(parts, tensor)

    def gather(self, outputs: Sequence[torch.Tensor] | None, tensor: torch.Tensor, root: int) -> None:
        """Fills ``outputs[rank]`` of ``root`` with that rank's ``tensor``; all of one size; None on the other ranks."""
        header = _header(_Kind.GATHER, 0, tensor.dtype, tensor.nbytes, root)
        self._gather(outputs, tensor, tensor.nbytes, header, None)

    def reduce_scatter(
        self, output: torch.Tensor, tensors: Sequence[torch.Tensor], reduction: Reduction
    ) -> None:
        """Fills ``output`` with the reduction over ranks of their ``tensors[my rank]``; sizes may differ by rank."""
        sizes = [tensor.numel() for tensor in tensors]
        if sizes[self._rank] != output.numel():
            raise ProgramError(
                f"reduce_scatter: my output has {output.numel()} elements, but my input {sizes[self._rank]}",
                hint="the output of a rank must have the size of the input meant for it",
            )
        header = _header(_Kind.REDUCE_SCATTER, reduction, output.dtype, sum(sizes))
        self._reduce_scatter_parts(output, tensors, reduction, header)

    def reduce_scatter_single(self, output: torch.Tensor, tensor: torch.Tensor, reduction: Reduction) -> None:
        """Fills ``output`` [N] with my part of the reduction over the ranks' ``tensor`` [n * N]."""
        parts = self._parts_of(tensor, output)
        place = self._segments.place_of(tensor)
        header = _header(_Kind.REDUCE_SCATTER, reduction, output.dtype, tensor.numel(), place=place)
        if place is not None:
            if self._segments.exchange(torch.uint8, header) is not None:
                start = self._rank * output.numel()
                sources = self._sources(place, tensor)
                for tile in _tiles(output.numel(), _TILE_BYTES // output.itemsize):
                    begin, end = start + tile.start, start + tile.stop
                    reduce_into(output[tile], [source[begin:end] for source in sources], reduction)
                self._release()
                return
            header = None
        self._reduce_scatter_parts(output, parts, reduction, header)

    def broadcast(self, tensor: torch.Tensor, root: int) -> None:
        """Fills ``tensor`` of every rank with that of ``root``."""
        data = _bytes(tensor)
        header = _header(_Kind.BROADCAST, 0, tensor.dtype, data.numel(), root)
        for tile in _tiles(data.numel(), self._slot_bytes):
            if self._rank == root:
                self._segments.outbox(torch.uint8)[: tile.stop - tile.start].copy_(data[tile])
            inbox = self._exchange(torch.uint8, header)
            header = None
            if self._rank != root:
                data[tile].copy_(inbox[root][: tile.stop - tile.start])

    def all_to_all(self, outputs: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor]) -> None:
        """Fills ``outputs[rank]`` with that rank's ``tensors[my rank]``; sizes may differ by pair."""
        self._all_to_all(outputs, tensors, _Kind.ALL_TO_ALL, 0)

    def scatter(self, output: torch.Tensor, tensors: Sequence[torch.Tensor] | None, root: int) -> None:
        """Fills ``output`` with ``tensors[my rank]`` of ``root``; None on the other ranks."""
        nothing = output[:0]
        outputs = [output if rank == root else nothing for rank in range(self._size)]
        self._all_to_all(outputs, tensors or [nothing] * self._size, _Kind.SCATTER, root)

    def _parts_of(self, whole: torch.Tensor, part: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if whole.numel() != self._size * part.numel() or whole.dtype != part.dtype:
            raise ProgramError(
                f"{whole.numel()} elements of {whole.dtype} are not {self._size} ranks times {part.numel()} of {part.dtype}",
                hint="use the list form of the collective for parts of different sizes",
            )
        return whole.view(self._size, -1).unbind() if whole.numel() else (whole,) * self._size

    def _exchange(self, dtype: torch.dtype, header: tuple[int, ...] | None) -> tuple[torch.Tensor, ...]:
        inbox = self._segments.exchange(dtype, header)
        assert inbox is not None, "only a call that can use an allocation may come out mixed"
        return inbox

    def _release(self) -> None:
        """Ends a call on allocations: after it everyone may write to them again."""
        self._segments.exchange(torch.uint8)

    def _sources(self, place: Place, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The ranks' tensors, by rank, where they lie in their allocations."""
        allocation, offset = place
        end = offset + tensor.nbytes
        return [buffer[offset:end].view(tensor.dtype) for buffer in allocation.buffers]

    def _all_reduce_in_place(self, tensor: torch.Tensor, reduction: Reduction, place: Place) -> None:
        sources = self._sources(place, tensor)
        mine = _shares(tensor.numel(), self._size)[self._rank]
        for tile in _tiles(mine.stop - mine.start, _TILE_BYTES // tensor.itemsize):
            part = slice(mine.start + tile.start, mine.start + tile.stop)
            parts = [source[part] for source in sources]
            reduce_into(parts[self._rank], parts, reduction)
            for rank, other in enumerate(parts):
                if rank != self._rank:
                    other.copy_(parts[self._rank])
        self._release()

    def _all_reduce_tiles(
        self,
        tensor: torch.Tensor,
        reduction: Reduction,
        header: tuple[int, ...] | None,
        *,
        has_result: bool = True,
    ) -> None:
        most_bytes = min(self._slot_bytes, _STREAM_BYTES)
        for tile in _tiles(tensor.numel(), most_bytes // tensor.itemsize):
            length = tile.stop - tile.start
            part = (
                tensor if length == tensor.numel() else tensor[tile]
            )  # a view costs as much as a short call
            self._segments.outbox(tensor.dtype)[:length].copy_(part)
            inbox = self._segments.exchange(tensor.dtype, header)
            if inbox is None:
                return self._all_reduce_tiles(tensor, reduction, None, has_result=has_result)
            header = None
            if has_result:
                sources = [part if r == self._rank else slot[:length] for r, slot in enumerate(inbox)]
                reduce_into(part, sources, reduction)
        return None

    def _all_reduce_windows(
        self, tensor: torch.Tensor, reduction: Reduction, header: tuple[int, ...] | None
    ) -> None:
        for window in _tiles(tensor.numel(), self._slot_bytes // tensor.itemsize // self._size * self._size):
            whole = tensor[window]
            shares = _shares(whole.numel(), self._size)
            if not self._reduce_window(
                whole[shares[self._rank]], [whole[s] for s in shares], reduction, header
            ):
                return self._all_reduce_windows(tensor, reduction, None)
            header = None
            self._gather_window([whole[share] for share in shares], whole[shares[self._rank]])
        return None

    def _reduce_window(
        self,
        output: torch.Tensor,
        parts: Sequence[torch.Tensor],
        reduction: Reduction,
        header: tuple[int, ...] | None,
    ) -> bool:
        """One exchange: my slot holds the parts for the others side by side; False if the header came out mixed."""
        starts = [0]
        for part in parts:
            starts.append(starts[-1] + part.numel())
        outbox = self._segments.outbox(output.dtype)
        for rank, part in enumerate(parts):
            if rank != self._rank:
                outbox[starts[rank] : starts[rank + 1]].copy_(part)
        inbox = self._segments.exchange(output.dtype, header)
        if inbox is None:
            return False
        mine = slice(starts[self._rank], starts[self._rank + 1])
        sources = [parts[r] if r == self._rank else slot[mine] for r, slot in enumerate(inbox)]
        reduce_into(output, sources, reduction)
        return True

    def _gather_window(self, parts: Sequence[torch.Tensor], mine: torch.Tensor) -> None:
        self._segments.outbox(mine.dtype)[: mine.numel()].copy_(mine)
        inbox = self._exchange(mine.dtype, None)
        for rank, part in enumerate(parts):
            if rank != self._rank:
                part.copy_(inbox[rank][: part.numel()])

    def _gather(
        self,
        outputs: Sequence[torch.Tensor] | None,
        tensor: torch.Tensor,
        largest_bytes: int,
        header: tuple[int, ...] | None,
        place: Place | None,
    ) -> None:
        if place is not None:
            if self._segments.exchange(torch.uint8, header) is not None:
                self._pull_whole(outputs, tensor, place)
                return
            header = None
        data = _bytes(tensor)
        views = [_bytes(output) for output in outputs] if outputs is not None else []
        for tile in _tiles(largest_bytes, self._slot_bytes):
            mine = data[tile]
            self._segments.outbox(torch.uint8)[: mine.numel()].copy_(mine)
            inbox = self._segments.exchange(torch.uint8, header)
            if inbox is None:
                return self._gather(outputs, tensor, largest_bytes, None, None)
            header = None
            for rank, view in enumerate(views):
                part = view[tile]
                part.copy_(mine if rank == self._rank else inbox[rank][: part.numel()])
        return None

    def _pull_whole(self, outputs: Sequence[torch.Tensor] | None, tensor: torch.Tensor, place: Place) -> None:
        allocation, offset = place
        for rank, output in enumerate(outputs or ()):
            source = tensor.view(torch.uint8) if rank == self._rank else allocation.buffers[rank][offset:]
            _bytes(output).copy_(source[: output.nbytes])
        self._release()

    def _pull_parts(self, parts: Sequence[torch.Tensor], place: Place) -> None:
        """Every rank's output holds its own part already; takes the others' from theirs."""
        allocation, offset = place
        part_bytes = parts[0].nbytes
        for rank, part in enumerate(parts):
            if rank != self._rank:
                start = offset + rank * part_bytes
                _bytes(part).copy_(allocation.buffers[rank][start : start + part_bytes])
        self._release()

    def _reduce_scatter_parts(
        self,
        output: torch.Tensor,
        parts: Sequence[torch.Tensor],
        reduction: Reduction,
        header: tuple[int, ...] | None,
    ) -> None:
        share = self._slot_bytes // output.itemsize // self._size
        for tile in _tiles(max(part.numel() for part in parts), share):
            if not self._reduce_window(output[tile], [part[tile] for part in parts], reduction, header):
                return self._reduce_scatter_parts(output, parts, reduction, None)
            header = None
        return None

    def _all_to_all(
        self, outputs: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor], kind: _Kind, root: int
    ) -> None:
        """The longest part decides the number of exchanges; it is in the header's free field of the first one."""
        share = self._slot_bytes // self._size
        sent, received = [_bytes(tensor) for tensor in tensors], [_bytes(output) for output in outputs]
        header: tuple[int, ...] | None = _header(
            kind, 0, outputs[0].dtype, 0, root, free=max(part.numel() for part in sent)
        )
        longest, start = 1, 0
        while start < longest:
            tile = slice(start, start + share)
            outbox = self._segments.outbox(torch.uint8)
            for rank, part in enumerate(sent):
                if rank != self._rank:
                    piece = part[tile]
                    outbox[rank * share : rank * share + piece.numel()].copy_(piece)
            inbox = self._exchange(torch.uint8, header)
            if header is not None:
                longest, header = max(theirs[7] for theirs in self._segments.headers()), None
            for rank, part in enumerate(received):
                piece, offset = part[tile], self._rank * share
                theirs = inbox[rank][offset : offset + piece.numel()]
                piece.copy_(sent[rank][tile] if rank == self._rank else theirs)
            start += share


def _header(
    kind: _Kind,
    reduction: int = 0,
    dtype: torch.dtype = torch.uint8,
    size: int = 0,
    root: int = 0,
    *,
    place: Place | None = None,
    is_output: bool = False,
    free: int = 0,
) -> tuple[int, ...] | None:
    """The words of ``SharedSegments.exchange``; an allocation that holds the output has a negative number."""
    where = (0, 0) if place is None else (-place[0].index if is_output else place[0].index, place[1])
    number = _DTYPES.index(dtype) if dtype in _DTYPES else -1
    return (int(kind), int(reduction), number, size, root, *where, free)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.uint8 else tensor.view(torch.uint8)


def _shares(length: int, size: int) -> list[slice]:
    """``length`` elements cut into ``size`` runs that differ by at most one element."""
    edges = [length * rank // size for rank in range(size + 1)]
    return [slice(start, stop) for start, stop in pairwise(edges)]


def _tiles(length: int, most: int) -> Iterator[slice]:
    """Runs of at most ``most`` elements; one empty run if there are none, for every call must meet its peers."""
    if length == 0:
        yield slice(0, 0)
    for start in range(0, length, most):
        yield slice(start, min(start + most, length))
