"""``replay``: what torch's caching allocator reserves on a CUDA device for a trace of allocations.

    request     rounded up to 512 B
    pool        small: up to 1 MiB, from segments of 2 MiB       large: from segments of 20 MiB, above 10 MiB of its own size, in 2 MiB
    block       the smallest free one of the pool that is large enough, of equal ones the first; else a new segment
    split       small: if 512 B are left over       large: if more than 1 MiB is left over
    free        the block joins its free neighbours of the same segment; segments stay reserved
    no memory   segments that are wholly free go back to the device, then once more

Sizes are those of c10/cuda/CUDACachingAllocator (kMinBlockSize, kSmallSize, kSmallBuffer, kLargeBuffer, kMinLargeAlloc, kRoundLarge) with
the default ``PYTORCH_CUDA_ALLOC_CONF``; the PyTorch notes on CUDA semantics, "Memory management", describe the behaviour.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, NamedTuple, TypeAlias

from shardstage.errors import ProgramError
from shardstage.units import MIB

__all__ = ["Allocation", "Replay", "replay"]

MIN_BLOCK_BYTES: Final = 512
SMALL_BYTES: Final = MIB
SMALL_SEGMENT_BYTES: Final = 2 * MIB
LARGE_SEGMENT_BYTES: Final = 20 * MIB
MIN_LARGE_BYTES: Final = 10 * MIB
ROUND_LARGE_BYTES: Final = 2 * MIB


class Allocation(NamedTuple):
    """A tensor of ``num_bytes`` appears under a name; with 0 bytes, the one of that name goes."""

    name: str
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Bytes at the moment when most was reserved (``allocated_bytes`` of rounded blocks), and the most that was allocated at any time.

    ``failed`` is the first allocation for which there was no memory; the trace was replayed up to it.
    """

    reserved_bytes: int
    allocated_bytes: int
    peak_allocated_bytes: int
    failed: Allocation | None = None

    @property
    def fragmentation(self) -> float:
        """Share of the reserved bytes that no tensor used even when most was allocated."""
        return 1 - self.peak_allocated_bytes / self.reserved_bytes if self.reserved_bytes else 0.0


def replay(trace: Iterable[Allocation], *, capacity_bytes: int | None = None) -> Replay:
    """Replays allocations in order on a device of ``capacity_bytes``; ``ProgramError`` for a name freed twice or never made."""
    allocator = _Allocator(capacity_bytes)
    reserved = at_most_reserved = peak = 0
    failed = None
    for event in trace:
        if not event.num_bytes:
            allocator.free(event.name)
            continue
        if not allocator.allocate(event):
            failed = event
            break
        peak = max(peak, allocator.allocated_bytes)
        if allocator.reserved_bytes > reserved:
            reserved, at_most_reserved = allocator.reserved_bytes, allocator.allocated_bytes
    return Replay(
        reserved_bytes=reserved,
        allocated_bytes=at_most_reserved,
        peak_allocated_bytes=peak,
        failed=failed,
    )


@dataclass(kw_only=True, eq=False)
class _Block:
    """Part of a segment; ``before`` and ``after`` are its neighbours in it."""

    size: int
    order: int
    is_small: bool
    is_free: bool = True
    before: _Block | None = field(default=None, repr=False)
    after: _Block | None = field(default=None, repr=False)

    @property
    def is_whole_segment(self) -> bool:
        return self.before is None and self.after is None


_Sorted: TypeAlias = tuple[int, int, _Block]
"""A block behind its size and its order, which no other has."""


class _Allocator:
    def __init__(self, capacity_bytes: int | None) -> None:
        self.capacity_bytes = capacity_bytes
        self.reserved_bytes = 0
        self.allocated_bytes = 0
        self._free: tuple[list[_Sorted], list[_Sorted]] = ([], [])  # of the large pool and the small one
        self._used: dict[str, _Block] = {}
        self._num_blocks = 0

    def allocate(self, event: Allocation) -> bool:
        """Whether there was memory for it."""
        if event.name in self._used:
            raise ProgramError(f"{event.name!r} is allocated twice", hint="free it first, with 0 bytes")
        size = _rounded(event.num_bytes, MIN_BLOCK_BYTES)
        is_small = size <= SMALL_BYTES
        block = self._best_fit(size, is_small) or self._new_segment(size, is_small)
        if block is None:
            return False
        self._take(block)
        block.is_free = False
        self._split(block, size)
        self._used[event.name] = block
        self.allocated_bytes += block.size
        return True

    def free(self, name: str) -> None:
        block = self._used.pop(name, None)
        if block is None:
            raise ProgramError(f"{name!r} is freed and was never allocated", hint="allocate it first")
        self.allocated_bytes -= block.size
        block.is_free = True
        before, after = block.before, block.after
        for neighbour in (before, after):
            if neighbour is not None and neighbour.is_free:
                self._take(neighbour)
                block = _joined(block, neighbour)
        self._add_free(block)

    def _best_fit(self, size: int, is_small: bool) -> _Block | None:
        pool = self._free[is_small]
        place = bisect_left(pool, (size, 0))
        return pool[place][2] if place < len(pool) else None

    def _new_segment(self, size: int, is_small: bool) -> _Block | None:
        """A segment as one free block; where there is no memory, after wholly free segments were given back."""
        num_bytes = _segment_bytes(size, is_small)
        if not self._fits(num_bytes):
            whole = [block for pool in self._free for *_, block in pool if block.is_whole_segment]
            for block in whole:
                self._take(block)
                self.reserved_bytes -= block.size
            if not self._fits(num_bytes):
                return None
        self.reserved_bytes += num_bytes
        return self._add_free(_Block(size=num_bytes, order=self._next(), is_small=is_small))

    def _fits(self, num_bytes: int) -> bool:
        return self.capacity_bytes is None or self.reserved_bytes + num_bytes <= self.capacity_bytes

    def _split(self, block: _Block, size: int) -> None:
        """Leaves what is over in the pool, if that is enough to be of use."""
        over = block.size - size
        if over < MIN_BLOCK_BYTES or (not block.is_small and over <= SMALL_BYTES):
            return
        rest = _Block(size=over, order=self._next(), is_small=block.is_small, before=block, after=block.after)
        if block.after is not None:
            block.after.before = rest
        block.size, block.after = size, rest
        self._add_free(rest)

    def _add_free(self, block: _Block) -> _Block:
        insort(self._free[block.is_small], (block.size, block.order, block))
        return block

    def _take(self, block: _Block) -> None:
        pool = self._free[block.is_small]
        del pool[bisect_left(pool, (block.size, block.order))]

    def _next(self) -> int:
        self._num_blocks += 1
        return self._num_blocks


def _joined(one: _Block, other: _Block) -> _Block:
    """The earlier of two neighbours, grown by the later."""
    first, second = (other, one) if one.before is other else (one, other)
    first.size += second.size
    first.after = second.after
    if second.after is not None:
        second.after.before = first
    first.is_free = True
    return first


def _segment_bytes(size: int, is_small: bool) -> int:
    if is_small:
        return SMALL_SEGMENT_BYTES
    return LARGE_SEGMENT_BYTES if size < MIN_LARGE_BYTES else _rounded(size, ROUND_LARGE_BYTES)


def _rounded(num_bytes: int, unit: int) -> int:
    return -(-num_bytes // unit) * unit
