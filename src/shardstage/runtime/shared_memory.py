"""One segment of memory per rank, mapped by every rank of a group on one host, and the waits between the ranks.

A segment is an anonymous memory file that the peers open through ``/proc/<pid>/fd/<fd>``: it has no name that could be
left behind, and the size of ``/dev/shm`` does not bound it. Pages cost memory only once they are touched.

    rank r's segment   | counters, 2 headers | slot 0 | slot 1 | pipe area |
                         written by r alone; everybody reads

One *exchange* is: write my slot of this step, announce it, wait for everyone, read the slots of all. The slots alternate,
so one barrier a step is enough: whoever writes slot ``k % 2`` at step k has passed barrier k-1, where every rank had
finished reading step k-2, the last one to use that slot.

Announcing by a plain store after the data, without a fence, is right only where stores become visible in program order:
x86. Elsewhere ``shared_rendezvous`` declines and the caller uses gloo.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from shardstage.errors import ProgramError, RankFailedError

__all__ = [
    "SLOTS_OFFSET_BYTES",
    "Allocation",
    "Peer",
    "Progress",
    "SharedMemoryOptions",
    "SharedSegments",
    "create_mapping",
    "open_mapping",
]

_CACHE_LINE_BYTES = 64
_ARRIVED = 0  # word index: number of exchanges this rank has announced
_CLOSED = 8  # word index, one cache line further: 1 once the rank has left the group
_HEADERS_OFFSET_BYTES = 128
_HEADER_FORMAT = struct.Struct("8q")
SLOTS_OFFSET_BYTES = 4096
_NUM_CALL_FIELDS = (
    5  # of a header: kind, operator, dtype, size, root; then allocation, offset; then a free field
)

_SPINS = 200  # about 15 us of pure looking before the first system call
_YIELDING_S = 200e-6  # then give way to runnable processes, and after that sleep, so that no core is burnt
_SLEEP_S = 20e-6
_LONGEST_SLEEP_S = 250e-6
_SLEEP_RATIO = 1 / 64  # of the time waited already: each look costs 10 us of a core that others may need
_LIVENESS_INTERVAL_S = 0.25


@dataclass(frozen=True, kw_only=True)
class SharedMemoryOptions:
    """Sizes of a rank's segment; every rank of a group must have the same.

    slot_bytes: the most that one exchange carries from a rank; larger tensors are streamed.
    part_bytes, num_parts: a send is cut into parts; a pair of ranks has this many in flight each way.
    enabled: False makes every group use gloo.
    """

    slot_bytes: int = 4 << 20
    part_bytes: int = 1 << 19
    num_parts: int = 64
    enabled: bool = True

    def __post_init__(self) -> None:
        if self.slot_bytes < 4096 or self.slot_bytes % 4096 or self.part_bytes < 64 or self.part_bytes % 64:
            raise ProgramError(
                f"slot_bytes={self.slot_bytes}, part_bytes={self.part_bytes}: must be multiples of 4096 and of 64",
                hint="SharedMemoryOptions(slot_bytes=4 << 20, part_bytes=1 << 19)",
            )

    @property
    def pipe_control_bytes(self) -> int:
        """Bytes of counters and part records that one rank keeps for one peer, page aligned."""
        return -(-(_CACHE_LINE_BYTES + self.num_parts * (32 + 8)) // 4096) * 4096

    @property
    def pipe_bytes(self) -> int:
        """Bytes that one rank keeps for one peer: control and the parts it sends."""
        return self.pipe_control_bytes + self.num_parts * self.part_bytes

    def pipe_offset_bytes(self, peer: int) -> int:
        """Where in a rank's segment lies what it keeps for ``peer``."""
        return SLOTS_OFFSET_BYTES + 2 * self.slot_bytes + peer * self.pipe_bytes

    def segment_bytes(self, size: int) -> int:
        """Bytes of one rank's segment in a group of ``size`` ranks; those never touched cost nothing."""
        return self.pipe_offset_bytes(size)


class Progress:
    """Things of this rank that must move on while it waits for something else: the unfinished sends of all its groups."""

    def __init__(self) -> None:
        self._polls: list[Callable[[], None]] = []

    def add(self, poll: Callable[[], None]) -> None:
        """Calls ``poll`` from now on whenever a wait of this rank takes long."""
        self._polls.append(poll)

    def remove(self, poll: Callable[[], None]) -> None:
        """Ends what ``add`` began; unknown polls are ignored."""
        if poll in self._polls:
            self._polls.remove(poll)

    def poll(self) -> None:
        """Moves everything on as far as it goes without waiting."""
        for poll in self._polls:
            poll()


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """A buffer of the same size on every rank that all ranks can read and write: ``buffers[rank]``, uint8 [num_bytes]."""

    index: int
    num_bytes: int
    address: int
    buffers: tuple[torch.Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Another rank of the group: its group rank, its name in errors, its process."""

    rank: int
    label: str
    pid: int
    pidfd: int | None

    def is_gone(self) -> bool:
        """True if its process has ended, be it a zombie."""
        if self.pidfd is not None:
            poller = select.poll()
            poller.register(self.pidfd, select.POLLIN)
            return bool(poller.poll(0))
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        return False


class SharedSegments:
    """The segments of all ranks of one group, as one rank sees them. For one thread at a time.

    Errors: ``RankFailedError`` from every wait, naming the ranks that are dead, have left, or did not come in time;
    ``ProgramError`` when the ranks of an exchange came with different calls.
    """

    def __init__(
        self,
        *,
        rank: int,
        memories: Sequence[mmap.mmap],
        peers: Sequence[Peer],
        options: SharedMemoryOptions,
        timeout_s: float,
        progress: Progress,
    ) -> None:
        self.rank = rank
        self.size = len(memories)
        self.options = options
        self.timeout_s = timeout_s
        self.progress = progress
        self.peers = tuple(peers)
        self.buffers = tuple(torch.frombuffer(memory, dtype=torch.uint8) for memory in memories)
        self.memories = tuple(memoryview(memory) for memory in memories)
        self.words = tuple(memory.cast("q") for memory in self.memories)
        self.allocations: list[Allocation] = []
        self._step = 0
        self._slots: dict[torch.dtype, tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]] = {}
        self._headers = tuple(
            tuple(memory[start : start + _HEADER_FORMAT.size] for memory in self.memories)
            for start in (_HEADERS_OFFSET_BYTES, _HEADERS_OFFSET_BYTES + _CACHE_LINE_BYTES)
        )
        self._arrivals = tuple((peer, self.words[peer.rank]) for peer in self.peers)

    def outbox(self, dtype: torch.dtype) -> torch.Tensor:
        """My slot of the coming exchange: [slot_bytes / itemsize] of ``dtype``."""
        return self._slots_of(dtype)[self._step & 1][self.rank]

    def exchange(
        self, dtype: torch.dtype, header: tuple[int, ...] | None = None
    ) -> tuple[torch.Tensor, ...] | None:
        """Announces my slot, waits for everyone's, returns the slots by rank; they hold until my next exchange.

        With a ``header`` (kind, operator, dtype, size, root, allocation, offset, free), checks that everybody made the
        same call, and returns None when they differ only in which allocation their tensor lies.
        """
        parity = self._step & 1
        headers = self._headers[parity]
        mine = b""
        if header is not None:
            mine = _HEADER_FORMAT.pack(*header)
            headers[self.rank][:] = mine
        self._barrier()
        if header is not None:
            for peer in self.peers:
                if headers[peer.rank] != mine and not self._agree(parity):
                    return None
        return self._slots_of(dtype)[parity]

    def headers(self) -> list[tuple[int, ...]]:
        """What every rank wrote as header in the last exchange, by rank."""
        return [_HEADER_FORMAT.unpack(header) for header in self._headers[(self._step - 1) & 1]]

    def wait(self, missing: Callable[[], list[Peer]], what: str) -> None:
        """Returns once ``missing()`` is empty; until then polls, then yields, then sleeps in tiny bits."""
        for _ in range(_SPINS // 10):
            if not missing():
                return
        self._wait_patiently(missing, what)

    def allocate(self, num_bytes: int) -> Allocation:
        """A new buffer of ``num_bytes``, zeroed, on every rank; every rank of the group must call it, in the same order."""
        fd, memory = create_mapping(max(num_bytes, 1), "shardstage-buffer")
        outbox = self.outbox(torch.int64)
        outbox[0], outbox[1], outbox[2] = os.getpid(), fd, num_bytes
        inbox = self.exchange(torch.int64)
        assert inbox is not None
        cards = [slot[:3].tolist() for slot in inbox]
        if len({card[2] for card in cards}) > 1:
            sizes = ", ".join(str(card[2]) for card in cards)
            raise ProgramError(
                f"a shared buffer must have the same size on every rank of its group; by rank: {sizes} bytes",
                hint="pad the buffer to the largest rank's size",
            )
        memories = [
            memory if rank == self.rank else open_mapping(pid, peer_fd, max(num_bytes, 1))
            for rank, (pid, peer_fd, _) in enumerate(cards)
        ]
        self._barrier()  # everyone has opened my file
        os.close(fd)
        buffers = tuple(torch.frombuffer(memory, dtype=torch.uint8)[:num_bytes] for memory in memories)
        allocation = Allocation(
            index=len(self.allocations) + 1,
            num_bytes=num_bytes,
            address=buffers[self.rank].data_ptr(),
            buffers=buffers,
        )
        self.allocations.append(allocation)
        return allocation

    def place_of(self, tensor: torch.Tensor) -> tuple[Allocation, int] | None:
        """The allocation that holds all of this contiguous tensor and its byte offset there, or None."""
        if not self.allocations:
            return None
        address = tensor.data_ptr()
        for allocation in self.allocations:
            offset = address - allocation.address
            if 0 <= offset and offset + tensor.nbytes <= allocation.num_bytes:
                return allocation, offset
        return None

    def close(self) -> None:
        """Tells the peers that this rank has left; a peer that then waits for it gets an error that says so."""
        self.words[self.rank][_CLOSED] = 1
        for peer in self.peers:
            if peer.pidfd is not None:
                with contextlib.suppress(OSError):
                    os.close(peer.pidfd)
        self.peers = tuple(
            Peer(rank=peer.rank, label=peer.label, pid=peer.pid, pidfd=None) for peer in self.peers
        )

    def _slots_of(self, dtype: torch.dtype) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        slots = self._slots.get(dtype)
        if slots is None:
            first, second = (
                tuple(buffer[start : start + self.options.slot_bytes].view(dtype) for buffer in self.buffers)
                for start in (SLOTS_OFFSET_BYTES, SLOTS_OFFSET_BYTES + self.options.slot_bytes)
            )
            slots = self._slots[dtype] = (first, second)
        return slots

    def _barrier(self) -> None:
        self._step = step = self._step + 1
        self.words[self.rank][_ARRIVED] = step
        for _, words in self._arrivals:
            for _ in range(_SPINS):
                if words[_ARRIVED] >= step:
                    break
            else:
                break
        else:
            return
        self._wait_patiently(
            lambda: [peer for peer, words in self._arrivals if words[_ARRIVED] < step], f"exchange {step}"
        )

    def _wait_patiently(self, missing: Callable[[], list[Peer]], what: str) -> None:
        began_s = time.monotonic()
        next_check_s = began_s + _LIVENESS_INTERVAL_S
        while absent := missing():
            self.progress.poll()
            now_s = time.monotonic()
            if now_s - began_s < _YIELDING_S:
                os.sched_yield()
                continue
            if now_s > next_check_s:
                next_check_s = now_s + _LIVENESS_INTERVAL_S
                self._check_alive(absent, missing, what)
                if now_s - began_s > self.timeout_s:
                    raise self._failure("did not arrive", missing() or absent, what)
            time.sleep(min(max(_SLEEP_S, (now_s - began_s) * _SLEEP_RATIO), _LONGEST_SLEEP_S))

    def _check_alive(self, absent: list[Peer], missing: Callable[[], list[Peer]], what: str) -> None:
        gone = [peer for peer in absent if peer.is_gone()]
        left = [peer for peer in absent if self.words[peer.rank][_CLOSED]]
        still_missing = {peer.rank for peer in missing()}  # it may have come, then ended
        for state, peers in (("is dead", gone), ("has left the group", left)):
            failed = [peer for peer in peers if peer.rank in still_missing]
            if failed:
                raise self._failure(state, failed, what)

    def _failure(self, state: str, peers: Sequence[Peer], what: str) -> RankFailedError:
        names = ", ".join(f"{peer.label} (pid {peer.pid})" for peer in peers)
        waited = f" within {self.timeout_s:g} s" if state == "did not arrive" else ""
        return RankFailedError(
            f"{names} {state}{waited}, while group rank {self.rank} of {self.size} waited in {what}",
            hint="read the log of that rank first; every rank must make the same calls in the same order",
        )

    def _agree(self, parity: int) -> bool:
        headers = [_HEADER_FORMAT.unpack(header) for header in self._headers[parity]]
        mine = headers[self.rank]
        for rank, header in enumerate(headers):
            if header[:_NUM_CALL_FIELDS] != mine[:_NUM_CALL_FIELDS]:
                raise ProgramError(
                    f"group rank {rank} called (kind, operator, dtype, size, root) = {header[:_NUM_CALL_FIELDS]} "
                    f"while group rank {self.rank} called {mine[:_NUM_CALL_FIELDS]}: the sequences differ",
                    hint="make the same collectives with the same sizes in the same order on every rank of a group",
                )
        return all(header[5:7] == mine[5:7] for header in headers)


def create_mapping(num_bytes: int, name: str) -> tuple[int, mmap.mmap]:
    """An anonymous memory file of ``num_bytes`` zeros, open and mapped; the peers open it while its number is open here."""
    fd = os.memfd_create(name)
    os.ftruncate(fd, num_bytes)
    return fd, mmap.mmap(fd, num_bytes)


def open_mapping(pid: int, fd: int, num_bytes: int) -> mmap.mmap:
    """The memory file that process ``pid`` has open under the number ``fd``. Errors: OSError."""
    opened = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    try:
        return mmap.mmap(opened, num_bytes)
    finally:
        os.close(opened)
