"""``DryRunRecorder``: sees every operator of an engine's step: what it tells other ranks, and what it keeps alive."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from torch import Tensor

from shardstage.cluster import CollectiveKind
from shardstage.compat import TorchDispatchMode, called_group
from shardstage.program import Collective, Instruction
from shardstage.runtime.dry_run_memory import HeldTensors, LiveTensors

__all__ = ["Act", "DryRunRecorder", "Sent"]


class Sent(NamedTuple):
    """A tensor to or from another rank."""

    peer: int
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}] with rank {self.peer}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Act:
    """What an instruction did: its ``collectives`` in order, what it sent, and its effect on memory, in bytes by category.

    ``change`` is what it left held more (or less) than before, ``rise`` how much more was held at its own peak, when ``largest`` were
    there. Buffers of receives, which are begun ahead of their instruction, are in neither.
    """

    instruction: Instruction
    collectives: tuple[Collective, ...]
    sent: tuple[Sent, ...]
    change: Mapping[str, int]
    rise: Mapping[str, int]
    largest: tuple[HeldTensors, ...]


@dataclass(kw_only=True)
class _Open:
    """An instruction of which nothing more may come but collectives that begin right after it."""

    act: Act | None = None
    collectives: list[Collective]
    sent: list[Sent]


class DryRunRecorder(TorchDispatchMode):
    """``acts`` are those of the engine's step, ``received`` what it began to receive, in order.

    ``axes`` name the axis of each group by the group's name. ``gradients`` gives those of the parameters.
    """

    def __init__(self, axes: Mapping[str, str], live: LiveTensors) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's is untyped
        self.live = live
        self.received: list[Sent] = []
        self.gradients: Callable[[], Iterable[Tensor]] = tuple
        self._axes = dict(axes)
        self._acts: list[_Open] = []
        self._current = _Open(collectives=[], sent=[])
        self._posted: Counter[str] = Counter()
        self._before: Counter[str] = Counter()

    @property
    def acts(self) -> tuple[Act, ...]:
        return tuple(_closed(found) for found in self._acts)

    def begin(self) -> None:
        """Forgets what was before the step."""
        self._acts.clear()
        self.received.clear()
        self._posted.clear()
        self._before = Counter(self.live.totals)
        self.live.begin()

    @contextmanager
    def span(self, instruction: Instruction) -> Iterator[None]:
        """Records what runs inside, and until the next span, as ``instruction``."""
        self._current = _Open(collectives=[], sent=[])
        self._acts.append(self._current)
        yield
        live = self.live
        if instruction.kind in ("B", "W"):
            live.classify(self.gradients(), "gradients")
        live.end(_SURVIVES_AS[instruction.kind])
        self._current.act = Act(
            instruction=instruction,
            collectives=(),
            sent=(),
            change=_difference(live.totals, self._before, self._posted),
            rise=_difference(live.peak, self._before, self._posted),
            largest=live.largest,
        )
        self._before = Counter(live.totals)
        self._posted.clear()
        live.begin()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._note(func.__name__.split(".")[0], args)
        results = func(*args, **(kwargs or {}))
        self._keep(results, func)
        return results

    def _keep(self, results: Any, func: Any) -> None:
        if isinstance(results, Tensor):
            self.live.add(results, str(func))
        elif isinstance(results, tuple | list):
            for result in results:
                self._keep(result, func)

    def _note(self, name: str, args: Any) -> None:
        if name == "send":
            self._current.sent.append(_sent(args))
        elif name == "recv_":
            received = _sent(args)
            self.received.append(received)
            category = "activations" if self._axes[called_group(args[1])] == "forward" else "communication"
            self._posted[category] += self.live.classify(args[0], category)
        elif name not in _SILENT:
            kind, whole = _COLLECTIVES[name]
            tensor = _first_tensor(args[whole])
            group = next(a for a in args if not isinstance(a, Tensor | list | tuple))
            numel = sum(t.numel() for t in args[whole][0]) if name in _LISTS else tensor.numel()
            self._current.collectives.append(
                Collective(self._axes[called_group(group)], kind, _dtype(tensor), numel)
            )


_SURVIVES_AS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "COUNT": "transient",
        "F": "activations",
        "B": "communication",
        "I": "activations",
        "W": "gradients",
        "SEND_F": "communication",
        "SEND_B": "communication",
        "RECV_F": "activations",
        "RECV_B": "communication",
        "UNSHARD": "parameters",
        "RESHARD": "parameters",
        "REDUCE_GRAD": "gradients",
        "STEP": "optimizer",
    }
)
"""What of an instruction's own tensors outlives it."""

_COLLECTIVES: Final[Mapping[str, tuple[CollectiveKind, int]]] = MappingProxyType(
    {  # operator: what it is, and which argument holds the whole tensor
        "allreduce_": ("all_reduce", 0),
        "_allgather_base_": ("all_gather", 0),
        "_reduce_scatter_base_": ("reduce_scatter", 1),
        "allgather_": ("all_gather", 0),
        "reduce_scatter_": ("reduce_scatter", 1),
        "alltoall_base_": ("all_to_all", 1),
        "broadcast_": ("broadcast", 0),
    }
)
_LISTS: Final = frozenset({"allgather_", "reduce_scatter_"})
_SILENT: Final = frozenset({"barrier", "monitored_barrier_"})


def _sent(args: Any) -> Sent:
    tensors, _group, peer, *_ = args
    return Sent(int(peer), _dtype(tensors[0]), tuple(tensors[0].shape))


def _first_tensor(argument: Any) -> Tensor:
    while not isinstance(argument, Tensor):
        argument = argument[0]
    return argument


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _difference(
    after: Mapping[str, int], before: Mapping[str, int], posted: Mapping[str, int]
) -> dict[str, int]:
    categories = dict.fromkeys((*after, *before))
    found = {c: after.get(c, 0) - before.get(c, 0) - posted.get(c, 0) for c in categories}
    return {category: num_bytes for category, num_bytes in found.items() if num_bytes}


def _closed(found: _Open) -> Act:
    act = found.act
    assert act is not None
    return Act(
        instruction=act.instruction,
        collectives=tuple(found.collectives),
        sent=tuple(found.sent),
        change=act.change,
        rise=act.rise,
        largest=act.largest,
    )
