"""Point to point messages between the ranks of one host through parts of shared memory.

    sender's segment, per destination    posted | records: place, tag, part bytes, message bytes | parts
    receiver's segment, per source       times each place was released

A message is cut into parts. The sender copies a part into its lowest free place (few places are ever touched, so they
stay in the caches) and posts a record; the receiver copies it out and releases the place. A place is free when it was
released as often as it was used. Every word has one writer. Messages between two ranks stay in order; tags pick among
those that have arrived.

A send whose parts do not fit at once goes on during every later wait of the sender, of any kind (``Progress``). A
receiver takes parts of messages that nobody asked for yet into its own memory once they hold half of the places, so a
sender is never stuck behind one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from shardstage.errors import ProgramError
from shardstage.runtime.shared_memory import Peer, SharedSegments

__all__ = ["PipeWork", "SharedPipes"]

_RECORDS = 8  # word index in the control block of a pair: after the count of posted parts, a cache line on
_RECORD_WORDS = 4


class PipeWork(dist.Work):
    """A send or receive under way; done once ``wait`` returned or ``is_completed`` is True."""

    def __init__(
        self, data: torch.Tensor, tag: int, source: int | None, complete: Callable[[PipeWork], None]
    ) -> None:
        super().__init__()
        self.data = data
        self.tag = tag
        self.source = source
        self.moved_bytes = 0
        self.is_done = False
        self._complete = complete

    def is_completed(self) -> bool:
        """True once all bytes have left or arrived."""
        return self.is_done

    def is_success(self) -> bool:
        """True once done: failures are raised by ``wait``."""
        return self.is_done

    def exception(self) -> None:
        """None: failures are raised by ``wait``."""

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Returns True once done. Errors: ``RankFailedError`` naming the peer that is dead or did not come."""
        if not self.is_done:
            self._complete(self)
        return True

    def synchronize(self) -> None:
        """``wait``."""
        self.wait()

    def result(self) -> list[torch.Tensor]:
        """The flat tensor."""
        return [self.data]

    def source_rank(self) -> int:
        """The group rank that sent what was received."""
        assert self.source is not None, "the source of a receive is known once it is done"
        return self.source

    _source_rank = source_rank

    def get_future(self) -> torch.futures.Future[Any]:
        """A completed future of the flat tensor; waits for it."""
        self.wait()
        future: torch.futures.Future[Any] = torch.futures.Future()
        future.set_result([self.data])
        return future


class SharedPipes:
    """The messages between this rank and the others of its group."""

    def __init__(self, segments: SharedSegments) -> None:
        self._segments = segments
        self._outlets = {peer.rank: _Outlet(segments, peer.rank) for peer in segments.peers}
        self._inlets = {peer.rank: _Inlet(segments, peer.rank) for peer in segments.peers}
        self._peers = {peer.rank: peer for peer in segments.peers}
        self._wanted: list[PipeWork] = []
        segments.progress.add(self.poll)

    def send(self, tensor: torch.Tensor, destination: int, tag: int) -> PipeWork:
        """Sends the flat ``tensor``; done at once if its parts fit, else it must not change until done."""
        outlet = self._outlets[self._checked(destination)]
        data = tensor.view(torch.uint8)
        work = PipeWork(data, tag, None, lambda work: self._wait(work, [self._peers[destination]]))
        outlet.unsent.append(work)
        outlet.push()
        return work

    def receive(self, tensor: torch.Tensor, source: int | None, tag: int) -> PipeWork:
        """Fills the flat ``tensor`` with the next message of ``source`` (None: of any rank) that has this tag."""
        peers = list(self._peers.values()) if source is None else [self._peers[self._checked(source)]]
        work = PipeWork(tensor.view(torch.uint8), tag, source, lambda work: self._wait(work, peers))
        for peer in peers:
            message = self._inlets[peer.rank].find(tag)
            if message is not None:
                self._inlets[peer.rank].deliver(message, work)
                return work
        self._wanted.append(work)
        self.poll()
        return work

    def poll(self) -> None:
        """Moves unfinished sends and arriving messages on, without waiting."""
        for outlet in self._outlets.values():
            if outlet.unsent:
                outlet.push()
        for inlet in self._inlets.values():
            inlet.drain(self._wanted)

    def close(self) -> None:
        """Ends what moves on during other waits."""
        self._segments.progress.remove(self.poll)

    def _checked(self, peer: int) -> int:
        if peer not in self._peers:
            raise ProgramError(
                f"group rank {self._segments.rank} cannot exchange messages with group rank {peer} of "
                f"{self._segments.size}",
                hint="send to another rank of the group",
            )
        return peer

    def _wait(self, work: PipeWork, peers: list[Peer]) -> None:
        def missing() -> list[Peer]:
            self.poll()
            return [] if work.is_done else peers

        self._segments.wait(missing, f"message with tag {work.tag}")


class _Outlet:
    """The sending end of a pair: this rank to ``destination``."""

    def __init__(self, segments: SharedSegments, destination: int) -> None:
        options = segments.options
        self.unsent: deque[PipeWork] = deque()
        self._part_bytes = options.part_bytes
        self._num_parts = options.num_parts
        offset = options.pipe_offset_bytes(destination)
        parts = offset + options.pipe_control_bytes
        self._parts = segments.buffers[segments.rank][parts : parts + self._num_parts * self._part_bytes]
        self._words = segments.words[segments.rank][offset // 8 :]
        self._released = _released_words(segments, owner=destination, source=segments.rank)
        self._used = [0] * self._num_parts
        self._posted = 0

    def push(self) -> None:
        """Posts parts of the unsent messages, in order, until no place is free."""
        while self.unsent:
            work = self.unsent[0]
            while not work.is_done:
                place = self._free_place()
                if place is None:
                    return
                self._post(work, place)
            self.unsent.popleft()

    def _free_place(self) -> int | None:
        for place, times in enumerate(self._used):
            if self._released[place] == times:
                return place
        return None

    def _post(self, work: PipeWork, place: int) -> None:
        total_bytes = work.data.numel()
        part = work.data[work.moved_bytes : work.moved_bytes + self._part_bytes]
        start = place * self._part_bytes
        self._parts[start : start + part.numel()].copy_(part)
        record = _RECORDS + self._posted % self._num_parts * _RECORD_WORDS
        words = self._words
        words[record], words[record + 1] = place, work.tag
        words[record + 2], words[record + 3] = part.numel(), total_bytes
        self._used[place] += 1
        self._posted += 1
        words[0] = self._posted
        work.moved_bytes += part.numel()
        work.is_done = work.moved_bytes == total_bytes


@dataclass
class _Message:
    """What has arrived of a message: given to a receive, or held in places and copies until one asks for it."""

    tag: int
    total_bytes: int
    arrived_bytes: int = 0
    receive: PipeWork | None = None
    held: list[tuple[int, int | torch.Tensor, int]] = field(
        default_factory=list
    )  # offset, place or copy, bytes


class _Inlet:
    """The receiving end of a pair: ``source`` to this rank."""

    def __init__(self, segments: SharedSegments, source: int) -> None:
        options = segments.options
        offset = options.pipe_offset_bytes(segments.rank)
        parts = offset + options.pipe_control_bytes
        self._source = source
        self._part_bytes = options.part_bytes
        self._num_parts = options.num_parts
        self._parts = segments.buffers[source][parts : parts + self._num_parts * self._part_bytes]
        self._words = segments.words[source][offset // 8 :]
        self._released = _released_words(segments, owner=segments.rank, source=source)
        self._num_seen = 0
        self._num_held = 0
        self._unmatched: list[_Message] = []
        self._current: _Message | None = None

    def find(self, tag: int) -> _Message | None:
        """The oldest message with this tag that nobody asked for yet."""
        return next((message for message in self._unmatched if message.tag == tag), None)

    def drain(self, wanted: list[PipeWork]) -> None:
        """Takes in every posted part; the first wanted receive that fits a new message gets it."""
        while self._num_seen < self._words[0]:
            record = _RECORDS + self._num_seen % self._num_parts * _RECORD_WORDS
            place, tag, num_bytes, total_bytes = self._words[record : record + _RECORD_WORDS].tolist()
            self._num_seen += 1
            message = self._current
            if message is None:
                message = self._begin(_Message(tag=tag, total_bytes=total_bytes), wanted)
            offset = message.arrived_bytes
            message.arrived_bytes += num_bytes
            self._current = message if message.arrived_bytes < total_bytes else None
            if message.receive is not None:
                self._copy_out(message.receive, offset, place, num_bytes)
            else:
                self._hold(message, offset, place, num_bytes)

    def deliver(self, message: _Message, receive: PipeWork) -> None:
        """Gives a message that has begun to arrive to the receive that asks for it."""
        self._unmatched.remove(message)
        self._match(message, receive)
        for offset, held, num_bytes in message.held:
            if isinstance(held, int):
                self._num_held -= 1
            self._copy_out(receive, offset, held, num_bytes)
        message.held.clear()

    def _begin(self, message: _Message, wanted: list[PipeWork]) -> _Message:
        for receive in wanted:
            if receive.tag == message.tag and receive.source in (None, self._source):
                wanted.remove(receive)
                self._match(message, receive)
                return message
        self._unmatched.append(message)
        return message

    def _match(self, message: _Message, receive: PipeWork) -> None:
        if message.total_bytes != receive.data.numel():
            raise ProgramError(
                f"group rank {self._source} sent {message.total_bytes} bytes with tag {message.tag} to a receive of "
                f"{receive.data.numel()} bytes",
                hint="send and receive tensors of the same size and dtype, in the same order",
            )
        receive.source = self._source
        message.receive = receive

    def _hold(self, message: _Message, offset: int, place: int, num_bytes: int) -> None:
        if self._num_held < self._num_parts // 2:
            self._num_held += 1
            message.held.append((offset, place, num_bytes))
            return
        start = place * self._part_bytes
        message.held.append((offset, self._parts[start : start + num_bytes].clone(), num_bytes))
        self._released[place] += 1

    def _copy_out(self, receive: PipeWork, offset: int, held: int | torch.Tensor, num_bytes: int) -> None:
        target = receive.data[offset : offset + num_bytes]
        if isinstance(held, int):
            start = held * self._part_bytes
            target.copy_(self._parts[start : start + num_bytes])
            self._released[held] += 1
        else:
            target.copy_(held)
        receive.moved_bytes += num_bytes
        receive.is_done = receive.moved_bytes == receive.data.numel()


def _released_words(segments: SharedSegments, *, owner: int, source: int) -> memoryview:
    """How often ``owner`` released each place of the messages from ``source``; written by ``owner`` alone."""
    options = segments.options
    start = options.pipe_offset_bytes(source) // 8 + _RECORDS + options.num_parts * _RECORD_WORDS
    return segments.words[owner][start : start + options.num_parts]
