"""``ModelGraph``: a model's forward computation, from batch to loss, as plain data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from shardstage.graph.scale import at
from shardstage.units import dtype_bytes

if TYPE_CHECKING:
    from shardstage.graph.blocks import Block

__all__ = ["Constant", "ModelGraph", "Op", "Parameter", "Ref", "Value", "refs_in", "substitute"]


@dataclass(frozen=True, slots=True)
class Ref:
    """An argument that is the value called ``name``; every other argument of an op is a literal."""

    name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Value:
    """A tensor of the graph: an input, parameter, buffer, constant, the output of an op, or what autograd keeps of one.

    ``alias_of`` names the value whose storage this one views (a reshape, a slice); empty where it has its own. Values of kind
    ``saved`` are no op's output: they are what autograd keeps besides inputs and outputs (a logsumexp, a normalisation's mean).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: Literal["input", "parameter", "buffer", "constant", "activation", "saved"]
    requires_grad: bool = False
    alias_of: str = ""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.numel * dtype_bytes(self.dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """A parameter or buffer of the model: ``name`` is the value's name, ``fqn`` the model's own name for it.

    ``ties`` are the further names under which the model holds the very same tensor.
    """

    name: str
    fqn: str
    ties: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Constant:
    """A small tensor written into the model's code: its elements in row-major order."""

    name: str
    elements: tuple[float | int | bool, ...]


@dataclass(frozen=True, kw_only=True)
class Op:
    """One operator call.

    ``target`` is torch's name of it (``aten.linear.default``) or one of ours (``shardstage.all_reduce``). ``args`` and
    ``kwargs`` are literals, ``Ref``s, and tuples of both; dtypes and devices are strings (``"float32"``). An op with one
    output lists one name; one that returns several tensors lists them in order, ``None`` where nobody uses it.
    ``module`` is the path of the submodule that called it and ``module_type`` its class; ``source`` is ``file:line: code``.
    ``saved`` names the values that autograd keeps from this op's forward to its backward (inputs, outputs, or kind ``saved``).
    """

    name: str
    target: str
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()
    outputs: tuple[str | None, ...] = ()
    returns_sequence: bool = False
    module: str = ""
    module_type: str = ""
    source: str = ""
    saved: tuple[str, ...] = ()

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """Names of the values it reads, in order of appearance, each once."""
        return tuple(dict.fromkeys(r.name for r in refs_in((self.args, tuple(v for _, v in self.kwargs)))))


@dataclass(frozen=True, kw_only=True)
class ModelGraph:
    """A model's computation from a batch to the sum of its losses, in execution order.

    ``output`` is a scalar: the *sum* of the losses of all target tokens of the microbatch (never the mean: the engine divides
    by the number of targets of the global batch). ``microbatch`` and ``sequence`` are the sizes that it was captured at;
    ``at`` gives the same graph at other microbatches where it ``is_scalable``, at other lengths where it ``is_sequence_scalable``.
    Invariants: acyclic and ordered; every parameter listed exactly once.
    """

    ops: tuple[Op, ...]
    values: Mapping[str, Value]
    inputs: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    buffers: tuple[Parameter, ...] = ()
    constants: tuple[Constant, ...] = ()
    output: str = ""
    microbatch: int = 1
    sequence: int | None = None
    is_scalable: bool = False
    is_sequence_scalable: bool = False
    notes: tuple[str, ...] = field(default=())

    def at(self, *, microbatch: int, sequence: int | None = None) -> ModelGraph:
        """The same computation for ``microbatch`` samples of ``sequence`` tokens; ``shardstage.graph.scale`` has the rule."""
        return at(self, microbatch=microbatch, sequence=sequence)

    @cached_property
    def producer(self) -> Mapping[str, int]:
        """Index of the op that makes a value; inputs, parameters, buffers and constants have none."""
        return {out: i for i, op in enumerate(self.ops) for out in op.outputs if out is not None}

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks that tile all ops: ``find_blocks``, asked once."""
        from shardstage.graph.blocks import find_blocks

        return find_blocks(self)

    @cached_property
    def fingerprint(self) -> str:
        """``file.fingerprint``, asked once."""
        from shardstage.graph.file import fingerprint

        return fingerprint(self)

    @cached_property
    def consumers(self) -> Mapping[str, tuple[int, ...]]:
        """Indices of the ops that read a value, in order."""
        found: dict[str, list[int]] = {name: [] for name in self.values}
        for i, op in enumerate(self.ops):
            for name in op.inputs:
                found[name].append(i)
        return {name: tuple(indices) for name, indices in found.items()}

    @cached_property
    def parameter_of(self) -> Mapping[str, Parameter]:
        """Parameter or buffer by value name."""
        return {p.name: p for p in (*self.parameters, *self.buffers)}

    @property
    def is_of_modules(self) -> bool:
        """Whether the ops are whole modules (``fallback``), of which nobody knows what they compute or keep."""
        return any(op.target in ("shardstage.loss", "shardstage.after") for op in self.ops[-1:])

    @property
    def parameter_bytes(self) -> int:
        """Bytes of all parameters, tied ones once, in the dtype of capture."""
        return sum(self.values[p.name].num_bytes for p in self.parameters)

    @property
    def num_parameters(self) -> int:
        return sum(self.values[p.name].numel for p in self.parameters)


def refs_in(argument: Any) -> Iterator[Ref]:
    """All ``Ref``s in a nested argument, in order of appearance."""
    if isinstance(argument, Ref):
        yield argument
    elif isinstance(argument, tuple | list):
        for item in argument:
            yield from refs_in(item)


def substitute(argument: Any, replace: Callable[[Ref], Any]) -> Any:
    """The nested argument with every ``Ref`` replaced."""
    if isinstance(argument, Ref):
        return replace(argument)
    if isinstance(argument, tuple | list):
        return tuple([substitute(item, replace) if isinstance(item, _NESTED) else item for item in argument])
    return argument


_NESTED = (Ref, tuple, list)
