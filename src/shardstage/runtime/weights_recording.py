"""``InitRecording``: what a model's constructor does to tensors on meta, to be done later for one tensor at a time.

A model whose parameters lie on meta costs nothing to build, and its own initialisation (constructors, ``reset_parameters``, Hugging Face's
``_init_weights`` with all its special cases) runs over it as over a real one. The recording keeps those calls; ``value`` repeats, on
real memory, only the ones that one tensor depends on:

    constructor      weight.uniform_(-b, b)   bias.uniform_(-b, b)   weight.normal_(0, 0.02)   bias.zero_()
    value(weight)                                                    weight.normal_(0, 0.02)
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from shardstage.compat import TorchDispatchMode, storage_key, written_tensors

__all__ = ["InitRecording", "draw_seed"]

# Operators that fill their first argument whatever it held before.
_FILLS = frozenset(
    f"aten::{name}_"
    for name in "normal uniform fill zero copy random exponential bernoulli log_normal cauchy geometric".split()
)
_ALLOCATIONS = frozenset(
    f"aten::{name}" for name in ("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided")
)
# torch.nn.init does nothing in these on meta: their Python code looks at the values.
_BLIND_ON_META = ("trunc_normal_", "orthogonal_", "dirac_", "sparse_")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Call:
    """One call that wrote to storages on meta. It holds its tensors, so that their storages keep their keys."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Tensor, ...]
    reads: frozenset[int]
    writes: frozenset[int]
    filled: int | None


class InitRecording:
    """Every call that wrote to a tensor on meta while the recording was ``running``.

    Every call draws from a generator of its own, seeded by the name of the first tensor that needs it (``name_draws``): a value does not
    depend on which other values are made, on this rank or elsewhere.
    """

    def __init__(self) -> None:
        self._calls: list[_Call] = []
        self._by_storage: dict[int, list[int]] = {}
        self._draw_names: dict[int, str] = {}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Records what is called in the block."""
        with _replaced_init_functions(self._note_init), _Watch(self._note):
            yield

    def name_draws(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Names each call after the first of ``tensors`` (name, tensor) whose value needs it."""
        for name, tensor in tensors:
            for ordinal, index in enumerate(self._needed(tensor)):
                self._draw_names.setdefault(index, f"{name}#{ordinal}")

    def has_value(self, tensor: Tensor) -> bool:
        """Whether any call gave the tensor a value."""
        return bool(self._needed(tensor))

    def value(self, tensor: Tensor, seed: int) -> Tensor:
        """What a tensor on meta would hold, on the CPU; zeros where nothing wrote. Torch's own generator is left as it was."""
        replay = _Replay()
        with torch.no_grad(), torch.random.fork_rng(devices=()):
            for index in self._needed(tensor):
                torch.default_generator.manual_seed(draw_seed(seed, self._draw_names.get(index, f"#{index}")))
                replay.repeat(self._calls[index])
            return replay.real(tensor) if self.has_value(tensor) else torch.zeros_like(tensor, device="cpu")

    def _note(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        name = function._schema.name
        outputs = tuple(_on_meta(result))
        inputs = {storage_key(t) for t in _on_meta((args, kwargs))}
        written = [t for t in written_tensors(function, args, kwargs) if t.is_meta]
        made = {storage_key(t) for t in outputs} - inputs
        if written or (made and name not in _ALLOCATIONS):
            writes = frozenset({storage_key(t) for t in written} | made)
            self._add(function, args, kwargs, outputs, writes, may_fill=name in _FILLS)

    def _note_init(self, function: Callable[..., Any], tensor: Tensor, *args: Any, **kwargs: Any) -> None:
        self._add(function, (tensor, *args), kwargs, (), frozenset({storage_key(tensor)}), may_fill=True)

    def _add(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        outputs: tuple[Tensor, ...],
        writes: frozenset[int],
        *,
        may_fill: bool,
    ) -> None:
        first = args[0] if may_fill else None
        sources = {storage_key(t) for t in _on_meta((args[1:], kwargs))}
        fills = isinstance(first, Tensor) and _covers_storage(first) and storage_key(first) not in sources
        call = _Call(
            function=function,
            args=_map(args, _kept),
            kwargs=_map(kwargs, _kept),
            outputs=outputs,
            reads=frozenset(storage_key(t) for t in _on_meta((args, kwargs))),
            writes=writes,
            filled=storage_key(first) if fills and isinstance(first, Tensor) else None,
        )
        for key in call.writes:
            self._by_storage.setdefault(key, []).append(len(self._calls))
        self._calls.append(call)

    def _needed(self, tensor: Tensor) -> list[int]:
        """Indices of the calls that the tensor's final value depends on, in order."""
        live = {storage_key(tensor)}
        needed = []
        for index in sorted(self._connected(storage_key(tensor)), reverse=True):
            call = self._calls[index]
            if live & call.writes:
                needed.append(index)
                if call.filled is None:
                    live |= call.reads
                else:
                    live = (live - {call.filled}) | (call.reads - {call.filled})
        return needed[::-1]

    def _connected(self, key: int) -> set[int]:
        """Every call that writes to the storage, or to one that such a call reads, and so on."""
        found: set[int] = set()
        seen = {key}
        todo = [key]
        while todo:
            for index in self._by_storage.get(todo.pop(), ()):
                if index not in found:
                    found.add(index)
                    new = self._calls[index].reads - seen
                    seen |= new
                    todo += new
        return found


def draw_seed(seed: int, name: str) -> int:
    """A seed for the draws called ``name``: stable across runs, machines and versions of Python."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves its modes untyped
    """Shows every call of an ATen operator to ``note``."""

    def __init__(self, note: Callable[..., None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._note = note

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self._note(func, args, kwargs or {}, result)
        return result


class _Replay:
    """Real storages in the place of those on meta."""

    def __init__(self) -> None:
        self._storages: dict[int, torch.UntypedStorage] = {}

    def real(self, meta: Tensor) -> Tensor:
        key = storage_key(meta)
        if key not in self._storages:
            self._storages[key] = _empty_storage(meta)
        empty = torch.empty(0, dtype=meta.dtype)
        return empty.set_(self._storages[key], meta.storage_offset(), meta.size(), meta.stride())

    def repeat(self, call: _Call) -> None:
        made = [t for t in call.outputs if storage_key(t) in call.writes - call.reads]
        result = call.function(*_map(call.args, self._argument), **_map(call.kwargs, self._argument))
        for meta, real in zip(call.outputs, _tensors(result), strict=True) if made else ():
            if storage_key(meta) not in self._storages:
                self._storages[storage_key(meta)] = _strided_like(real, meta).untyped_storage()

    def _argument(self, argument: Any) -> Any:
        if isinstance(argument, Tensor):
            return self.real(argument) if argument.is_meta else argument
        if isinstance(argument, torch.device) and argument.type == "meta":
            return torch.device("cpu")
        # A generator of the model's own would be used in another order here than there.
        return None if isinstance(argument, torch.Generator) else argument


def _strided_like(real: Tensor, meta: Tensor) -> Tensor:
    if real.stride() == meta.stride() and real.storage_offset() == meta.storage_offset():
        return real
    empty = torch.empty(0, dtype=meta.dtype)
    return empty.set_(_empty_storage(meta), meta.storage_offset(), meta.size(), meta.stride()).copy_(real)


def _empty_storage(meta: Tensor) -> torch.UntypedStorage:
    """As large as the one on meta."""
    return torch.empty(meta.untyped_storage().nbytes(), dtype=torch.uint8).untyped_storage()


@contextmanager
def _replaced_init_functions(note: Callable[..., None]) -> Iterator[None]:
    """Lets ``note`` see the calls on meta of the functions of torch.nn.init that then do nothing, under every name they go by."""
    originals = [getattr(nn.init, name) for name in _BLIND_ON_META]
    replacements = {original: _noting(original, note) for original in originals}
    places = list(_places(originals))
    for names, name, original in places:
        names[name] = replacements[original]
    try:
        yield
    finally:
        for names, name, original in places:
            names[name] = original


def _places(functions: list[Callable[..., Any]]) -> Iterator[tuple[dict[str, Any], str, Callable[..., Any]]]:
    """Where the functions are bound: modules that imported them by name, and Hugging Face's own table of them."""
    tables: list[dict[str, Any]] = [
        vars(module) for module in list(sys.modules.values()) if hasattr(module, "__dict__")
    ]
    tables.append(getattr(sys.modules.get("transformers.initialization"), "TORCH_INIT_FUNCTIONS", {}))
    for table in tables:
        for function in functions:
            if table.get(function.__name__) is function:
                yield table, function.__name__, function


def _noting(original: Callable[..., Any], note: Callable[..., None]) -> Callable[..., Any]:
    @wraps(original)
    def init(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if tensor.is_meta:
            note(original, tensor, *args, **kwargs)
            return tensor
        return original(tensor, *args, **kwargs)

    return init


def _covers_storage(tensor: Tensor) -> bool:
    return (
        tensor.is_contiguous() and tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
    )


def _kept(argument: Any) -> Any:
    """Real tensors as they are now: the constructor may change them after the call."""
    return argument.clone() if isinstance(argument, Tensor) and not argument.is_meta else argument


def _on_meta(argument: Any) -> Iterator[Tensor]:
    return (tensor for tensor in _tensors(argument) if tensor.is_meta)


def _tensors(argument: Any) -> Iterator[Tensor]:
    if isinstance(argument, Tensor):
        yield argument
    elif isinstance(argument, list | tuple | dict):
        for item in argument.values() if isinstance(argument, dict) else argument:
            yield from _tensors(item)


def _map(argument: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(argument, list | tuple):
        return type(argument)(_map(item, change) for item in argument)
    if isinstance(argument, dict):
        return {key: _map(item, change) for key, item in argument.items()}
    return change(argument)
