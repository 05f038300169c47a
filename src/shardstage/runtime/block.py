"""``Block``: consecutive ops of a stage as one module: the unit of recompute, of parameter sharding and of compilation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from shardstage.graph import Constant, ModelGraph, Op, Ref, substitute
from shardstage.graph.saved import SELECTIVE_TARGETS
from shardstage.operators import OperatorContext
from shardstage.operators.resolve import literal, resolve
from shardstage.plan.plan import Recompute

__all__ = ["Block", "BlockCode", "block_code"]


@dataclass(frozen=True, kw_only=True)
class BlockCode:
    """What a block computes for one size of microbatch: ``function(*parameters, *inputs) -> outputs``, all by value name."""

    function: Callable[..., tuple[Tensor, ...]]
    parameters: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class Block(nn.Module):
    """Runs its ops on local tensors.

    The parameters that only this block uses are its own (``self.<value name>``); those it shares with other blocks are read from
    ``shared``, where the stage holds them. With recompute, only its inputs (full) or those and the results of its matrix products
    (selective) are kept for backward.
    """

    def __init__(
        self,
        *,
        name: str,
        codes: Mapping[int, BlockCode],
        own: Mapping[str, nn.Parameter],
        shared: nn.Module,
        context: OperatorContext,
        recompute: Recompute,
    ) -> None:
        super().__init__()
        self.block_name = name
        self._codes = dict(codes)
        self._shared = (shared,)  # in a tuple: not a submodule, its parameters are not this block's
        self._context = context
        self._recompute = recompute
        for value, parameter in own.items():
            self.register_parameter(value, parameter)

    def forward(
        self, size: int, positions: tuple[int, ...], inputs: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """Outputs for a microbatch of ``size`` samples that stand at ``positions`` of the global batch."""
        if self._recompute == "none" or not torch.is_grad_enabled():
            return self._run(size, positions, inputs)
        outputs: tuple[Tensor, ...] = checkpoint(
            self._run,
            size,
            positions,
            inputs,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=_selective_contexts if self._recompute == "selective" else _no_contexts,
        )
        return outputs

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles the computation of every size, each on its first use."""
        self._codes = {
            size: BlockCode(
                function=torch.compile(code.function, *args, **kwargs),
                parameters=code.parameters,
                inputs=code.inputs,
                outputs=code.outputs,
            )
            for size, code in self._codes.items()
        }

    def _run(self, size: int, positions: tuple[int, ...], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        code = self._codes[size]
        self._context.random.positions = positions  # again when recomputed, under a later microbatch
        return code.function(*(self._parameter(name) for name in code.parameters), *inputs)

    def _parameter(self, name: str) -> Tensor:
        own = self._parameters.get(name)
        if own is not None:
            return own
        shared = self._shared[0]
        return shared.get_parameter(name) if name in shared._parameters else shared.get_buffer(name)


def block_code(
    graph: ModelGraph,
    ops: Sequence[Op],
    outputs: tuple[str, ...],
    *,
    library: Mapping[str, Callable[..., Any]],
    device: torch.device,
) -> BlockCode:
    """The ops as one Python function that drops every tensor after its last use."""
    produced = {name for op in ops for name in op.outputs}
    read = [name for name in dict.fromkeys(n for op in ops for n in op.inputs) if name not in produced]
    constants = {constant.name: constant for constant in graph.constants}
    stored = tuple(name for name in read if graph.values[name].kind in ("parameter", "buffer"))
    inputs = tuple(
        name for name in read if graph.values[name].kind not in ("parameter", "buffer", "constant")
    )
    tracer = _FunctionBuilder(library, device)
    for name in (*stored, *inputs):
        tracer.placeholder(name)
    for name in read:
        if name in constants:
            tracer.constant(constants[name], graph.values[name])
    for op in ops:
        tracer.call(op)
    return BlockCode(function=tracer.finish(outputs), parameters=stored, inputs=inputs, outputs=outputs)


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

    def constant(self, constant: Constant, value: Any) -> None:
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

    def finish(self, outputs: tuple[str, ...]) -> Callable[..., tuple[Tensor, ...]]:
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


_SAVED_OPS = frozenset(SELECTIVE_TARGETS)


def _keep_matrix_products(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    is_kept = str(op) in _SAVED_OPS
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


def _no_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), nullcontext()


_selective_contexts = partial(create_selective_checkpoint_contexts, _keep_matrix_products)
