"""``Recorder``: which tensors operators make and when these die, on torch's meta device, where none takes memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from shardstage.compat import TorchDispatchMode, storage_key

__all__ = ["Event", "Passage", "Recorder", "record"]


class Event(NamedTuple):
    """A tensor of ``num_bytes`` appears; with 0 bytes, the one of that number goes."""

    number: int
    num_bytes: int


class Passage(NamedTuple):
    """A unit's forward and backward of one microbatch, in order.

    ``first_backward`` makes the sums of the weights' gradients, which stay; ``backward`` adds to them. Tensor ``entered`` comes from the
    unit before, ``left`` goes to the one behind; ``gradient`` comes back from there, and ``handed_on`` goes to the unit before.
    """

    forward: tuple[Event, ...]
    first_backward: tuple[Event, ...]
    backward: tuple[Event, ...]
    entered: int
    left: int
    gradient: int
    handed_on: int = 0

    @property
    def kept_elsewhere(self) -> list[int]:
        """What the forward made and the backward did not free, other than the result: somebody else holds it."""
        freed = {event.number for event in (*self.forward, *self.backward) if not event.num_bytes}
        made = (event.number for event in self.forward if event.num_bytes)
        return [number for number in made if number not in freed and number != self.left]


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves its modes untyped
    """A storage keeps its number as long as it lives."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types for it
        self._events: list[Event] = []
        self._numbers: dict[int, tuple[int, Any]] = {}
        self._made = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.number(leaf)
        return result

    def number(self, tensor: Tensor) -> int:
        """Of a tensor's storage, which is new unless known."""
        key = storage_key(tensor)
        if key not in self._numbers:
            storage = tensor.untyped_storage()
            self._made += 1
            self._numbers[key] = (self._made, weakref.ref(storage, partial(self._died, key)))
            self._events.append(Event(self._made, storage.nbytes()))
        return self._numbers[key][0]

    def _died(self, key: int, _reference: Any) -> None:
        self._events.append(Event(self._numbers.pop(key)[0], 0))

    def take(self) -> tuple[Event, ...]:
        """What happened since it was last asked."""
        events, self._events = tuple(self._events), []
        return events


class _Enter(torch.autograd.Function):
    """What a unit gets: made by the unit before; its gradient leaves the unit."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, seen: dict[str, int], recorder: Recorder) -> Tensor:
        ctx.seen, ctx.recorder = seen, recorder
        made = torch.empty_like(leaf)
        seen["entered"] = recorder.number(made)
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        ctx.seen["handed_on"] = ctx.recorder.number(gradients[0])
        return None, None, None


class _Leave(torch.autograd.Function):
    """What a unit makes; its gradient comes from the unit behind, and nobody else keeps it."""

    @staticmethod
    def forward(ctx: Any, made: Tensor, seen: dict[str, int], recorder: Recorder) -> Tensor:
        ctx.seen, ctx.recorder, ctx.like = seen, recorder, (made.shape, made.dtype)
        seen["left"] = recorder.number(made)
        return made.view_as(made)

    @staticmethod
    def backward(ctx: Any, *_gradients: Tensor) -> tuple[Tensor, None, None]:
        shape, dtype = ctx.like
        gradient = torch.empty(shape, dtype=dtype, device="meta")
        ctx.seen["gradient"] = ctx.recorder.number(gradient)
        return gradient, None, None


def record(
    unit: Callable[[Tensor], Tensor],
    given: Tensor,
    constants: Iterable[Tensor],
    end: Callable[[], object] = lambda: None,
) -> Passage:
    """Runs a unit twice, forward and backward, on what has the shape of ``given``; ``constants`` are its parameters, without gradients.

    ``end`` is called after each backward.
    """
    recorder = Recorder()
    for tensor in (given, *constants):
        recorder.number(tensor)
    first, second = (_pass(unit, given, recorder, end) for _ in range(2))
    return second._replace(first_backward=_renumbered(first, second))


def _pass(
    unit: Callable[[Tensor], Tensor], given: Tensor, recorder: Recorder, end: Callable[[], object]
) -> Passage:
    seen: dict[str, int] = {}
    with recorder:
        recorder.take()
        left = _Leave.apply(  # type: ignore[no-untyped-call]  # torch has no types for it
            unit(_Enter.apply(given, seen, recorder)),  # type: ignore[no-untyped-call]  # a name would keep it alive
            seen,
            recorder,
        )
        forward = recorder.take()
        torch.autograd.backward(left, left.detach())
        end()
        return Passage(forward, (), recorder.take(), **seen)


def _renumbered(first: Passage, second: Passage) -> tuple[Event, ...]:
    """The first backward with the second pass's numbers: both forwards make the same tensors in the same order."""
    made = [event.number for event in first.forward if event.num_bytes]
    again = [event.number for event in second.forward if event.num_bytes]
    names = dict(zip(made, again, strict=True))
    names |= {first.left: second.left, first.gradient: second.gradient, first.handed_on: second.handed_on}
    return tuple(event._replace(number=names.get(event.number, event.number)) for event in first.backward)
