"""``BlockCode``: the ops of a block as one Python function, written once for all blocks that compute the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor, nn

from shardstage.graph import Constant, ModelGraph, Op, Ref, Value, substitute
from shardstage.graph.recompute import Recompute
from shardstage.operators.resolve import literal, resolve

__all__ = ["BlockCode", "BlockParts", "BlockWriter", "PartCode"]

Function = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True, kw_only=True)
class BlockCode:
    """What a block computes for one size of microbatch: ``function(*parameters, *inputs) -> outputs``, all by value name.

    Of its parameters those in ``products`` get a gradient from operators, once for each time that they stand there; those in
    ``others`` from autograd.
    """

    function: Function
    parameters: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    products: tuple[str, ...] = ()
    others: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class PartCode:
    """Consecutive ops of a block with what of them is recomputed; nothing after them in the block reads ``last_used``."""

    code: BlockCode
    recompute: Recompute
    last_used: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class BlockParts:
    """A block for one size of microbatch: one part, or several that run one after the other. ``outputs`` are what others read of it."""

    parts: tuple[PartCode, ...]
    outputs: tuple[str, ...]

    @staticmethod
    def of(codes: Sequence[BlockCode], modes: Sequence[Recompute], outputs: tuple[str, ...]) -> BlockParts:
        last: dict[str, int] = {}
        for number, code in enumerate(codes):
            last.update(dict.fromkeys((*code.inputs, *code.outputs), number))
        return BlockParts(
            parts=tuple(
                PartCode(
                    code=code,
                    recompute=mode,
                    last_used=tuple(name for name in last if last[name] == number and name not in outputs),
                )
                for number, (code, mode) in enumerate(zip(codes, modes, strict=True))
            ),
            outputs=outputs,
        )

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for part in self.parts for name in part.code.parameters))

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """What the parts read of what none of them makes."""
        made = {name for part in self.parts for name in part.code.outputs}
        read = (name for part in self.parts for name in part.code.inputs)
        return tuple(name for name in dict.fromkeys(read) if name not in made)

    @cached_property
    def products(self) -> tuple[str, ...]:
        return tuple(name for part in self.parts for name in part.code.products)

    @cached_property
    def others(self) -> frozenset[str]:
        return frozenset(name for part in self.parts for name in part.code.others)


class BlockWriter:
    """Writes the functions of a stage's blocks; layers that differ in nothing but names share one, compiled once if asked."""

    def __init__(
        self, library: Mapping[str, Callable[..., Any]], device: torch.device, *, is_compiled: bool
    ) -> None:
        self._library = library
        self._device = device
        self._is_compiled = is_compiled
        self._written: dict[str, Function] = {}

    def code(self, graph: ModelGraph, ops: Sequence[Op], outputs: tuple[str, ...]) -> BlockCode:
        """The ops as a function that drops every tensor after its last use."""
        ops = [_with_own_gradient(graph, op) for op in ops] if not self._is_compiled else ops
        produced = {name for op in ops for name in op.outputs}
        read = [name for name in dict.fromkeys(n for op in ops for n in op.inputs) if name not in produced]
        kinds = {name: graph.values[name].kind for name in read}
        stored = tuple(name for name in read if kinds[name] in ("parameter", "buffer"))
        constants = tuple(c for c in graph.constants if kinds.get(c.name) == "constant")
        inputs = tuple(name for name in read if kinds[name] not in ("parameter", "buffer", "constant"))
        key = _without_names((*stored, *inputs), constants, ops, outputs)
        if key not in self._written:
            function = self._write(graph, (*stored, *inputs), constants, ops, outputs)
            self._written[key] = torch.compile(function) if self._is_compiled else function
        return BlockCode(
            function=self._written[key],
            parameters=stored,
            inputs=inputs,
            outputs=outputs,
            products=tuple(name for op in ops if (name := _weight_of(op))),
            others=frozenset(
                name for op in ops for name in op.inputs if name in stored and name != _weight_of(op)
            ),
        )

    def _write(
        self,
        graph: ModelGraph,
        arguments: Sequence[str],
        constants: Sequence[Constant],
        ops: Sequence[Op],
        outputs: tuple[str, ...],
    ) -> Function:
        builder = _FunctionBuilder(self._library, self._device)
        for name in arguments:
            builder.placeholder(name)
        for constant in constants:
            builder.constant(constant, graph.values[constant.name])
        for op in ops:
            builder.call(op)
        return builder.finish(outputs)


_WEIGHTED: Final[Mapping[str, tuple[str, int]]] = MappingProxyType(
    {  # target: the operator that computes it with the weight's gradient apart, and which argument is the weight
        "aten.linear.default": ("shardstage.linear_weight", 1),
        "aten.addmm.default": ("shardstage.addmm_weight", 2),
        "aten.mm.default": ("shardstage.matmul_weight", 1),
        "aten.matmul.default": ("shardstage.matmul_weight", 1),
    }
)


def _with_own_gradient(graph: ModelGraph, op: Op) -> Op:
    """The op, as a product with a weight if it is one: of two dims, a parameter, and trained."""
    target, at = _WEIGHTED.get(op.target, ("", 0))
    weight = op.args[at] if target and len(op.args) > at and not op.kwargs else None
    if not isinstance(weight, Ref):
        return op
    value = graph.values[weight.name]
    is_trained = value.kind == "parameter" and value.requires_grad and len(value.shape) == 2
    return replace(op, target=target) if is_trained else op


def _weight_of(op: Op) -> str:
    """Name of the weight whose gradient an operator hands over itself; empty for any other op."""
    at = dict(_WEIGHTED.values()).get(op.target)
    weight = None if at is None else op.args[at]
    return weight.name if isinstance(weight, Ref) else ""


def _without_names(
    arguments: Sequence[str], constants: Sequence[Constant], ops: Sequence[Op], outputs: Sequence[str]
) -> str:
    """What the function computes, with values numbered in the order in which they appear."""
    number: dict[str, int] = {}

    def numbered(ref: Ref) -> str:
        return f"%{number.setdefault(ref.name, len(number))}"

    for name in (*arguments, *(constant.name for constant in constants)):
        numbered(Ref(name))
    lines = [
        (
            op.target,
            substitute(op.args, numbered),
            tuple((key, substitute(value, numbered)) for key, value in op.kwargs),
            tuple(None if name is None else numbered(Ref(name)) for name in op.outputs),
            op.returns_sequence,
        )
        for op in ops
    ]
    returned = [numbered(Ref(name)) for name in outputs]
    return repr((len(arguments), [constant.elements for constant in constants], lines, returned))


class _FunctionBuilder:
    """Writes ops into a ``torch.fx`` graph, whose code generator makes the function."""

    def __init__(self, library: Mapping[str, Callable[..., Any]], device: torch.device) -> None:
        self._graph = torch.fx.Graph()
        self._root = nn.Module()
        self._library = library
        self._device = device
        self._nodes: dict[str, torch.fx.Node] = {}

    def placeholder(self, name: str) -> None:
        self._nodes[name] = self._graph.placeholder(f"v{len(self._nodes)}")

    def constant(self, constant: Constant, value: Value) -> None:
        tensor = torch.tensor(constant.elements, dtype=getattr(torch, value.dtype), device=self._device)
        attribute = f"constant{len(self._nodes)}"
        self._root.register_buffer(attribute, tensor.reshape(value.shape))
        self._nodes[constant.name] = self._graph.get_attr(attribute)

    def call(self, op: Op) -> None:
        target = (
            _named(op.target, self._library[op.target]) if op.target in self._library else resolve(op.target)
        )
        node = self._graph.call_function(target, self._arguments(op.args), dict(self._keywords(op)))
        if op.returns_sequence:
            for index, name in enumerate(op.outputs):
                if name is not None:
                    self._nodes[name] = self._graph.call_function(_item, (node, index))
        elif op.outputs and op.outputs[0] is not None:
            self._nodes[op.outputs[0]] = node

    def finish(self, outputs: tuple[str, ...]) -> Function:
        self._graph.output(tuple(self._nodes[name] for name in outputs))
        return torch.fx.GraphModule(self._root, self._graph)

    def _arguments(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(substitute(self._literals(argument), self._node) for argument in arguments)

    def _keywords(self, op: Op) -> tuple[tuple[str, Any], ...]:
        return tuple((key, substitute(self._literals(argument), self._node)) for key, argument in op.kwargs)

    def _literals(self, argument: Any) -> Any:
        if isinstance(argument, tuple | list):
            return tuple(self._literals(item) for item in argument)
        return argument if isinstance(argument, Ref) else literal(argument, self._device)

    def _node(self, ref: Ref) -> torch.fx.Node:
        return self._nodes[ref.name]


def _named(target: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """The operator as a callable with the name under which generated code finds it."""
    named = partial(call)
    named.__name__ = named.__qualname__ = target.replace(".", "_")  # type: ignore[attr-defined]
    named.__module__ = __name__
    return named


def _item(sequence: Sequence[Tensor], index: int) -> Tensor:
    return sequence[index]
