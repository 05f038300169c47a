"""``annotate``: what only running the ops can tell of their values: sizes, whose storage they view, whether a gradient flows.

Every op runs once on tensors without data; ops that are equal up to names and sizes of nothing else run once for all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from shardstage.compat import FakeTensorMode, storage_key
from shardstage.graph.capture_targets import literal, resolve
from shardstage.graph.model_graph import Op, Ref, Value, substitute
from shardstage.graph.normalise import TracedOp

__all__ = ["TensorMeta", "annotate", "contiguous", "replay"]


# Ops that return the very tensor they are given where there is nothing to convert.
_CONVERSIONS = frozenset(
    {"aten.alias.default", "aten.to.device", "aten.to.dtype", "aten.to.dtype_layout", "aten.to.other"}
)


@dataclass(frozen=True, slots=True)
class TensorMeta:
    """All that shapes depend on, and whether autograd follows."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    requires_grad: bool = False

    @classmethod
    def of(cls, tensor: Tensor) -> TensorMeta:
        return cls(
            shape=tuple(tensor.shape),
            stride=tuple(tensor.stride()),
            dtype=str(tensor.dtype).removeprefix("torch."),
            requires_grad=tensor.requires_grad,
        )


@dataclass(frozen=True, slots=True)
class _Output:
    meta: TensorMeta
    alias_of: int | None  # index among the op's inputs


def annotate(
    traced: Iterable[TracedOp], stored: Mapping[str, TensorMeta], output: str
) -> tuple[tuple[Op, ...], dict[str, Value], str]:
    """The ops, the values that they make, and the name of the output. ``stored``: inputs, parameters, buffers and constants.

    An op made without gradients reads detached values, so that the list of ops alone says where gradients flow. Conversions that
    convert nothing are left out.
    """
    tape = _Tape(stored)
    names: dict[str, str] = {}
    for item in traced:
        op = _renamed(item.op, names)
        op = tape.detached(op) if item.is_without_grad else op
        if op.target in _CONVERSIONS and tape.is_identity(op):
            names[op.name] = op.inputs[0]
        else:
            tape.run(op)
    return tuple(tape.ops), tape.values, names.get(output, output)


def replay(ops: Iterable[Op], stored: Mapping[str, TensorMeta]) -> dict[str, Value]:
    """The values that the ops make from ``stored``. Raises what an op raises that does not fit its inputs."""
    tape = _Tape(stored)
    for op in ops:
        tape.run(op)
    return tape.values


def contiguous(value: Value) -> TensorMeta:
    """A value as it lies in memory of its own."""
    stride, strides = 1, []
    for size in reversed(value.shape):
        strides.append(stride)
        stride *= max(1, size)
    return TensorMeta(value.shape, tuple(reversed(strides)), value.dtype, value.requires_grad)


class _Tape:
    def __init__(self, stored: Mapping[str, TensorMeta]) -> None:
        self.ops: list[Op] = []
        self.values: dict[str, Value] = {}
        self._metas = dict(stored)
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._seen: dict[Any, tuple[_Output | None, ...]] = {}
        self._detached: dict[str, str] = {}

    def run(self, op: Op) -> None:
        inputs = op.inputs
        for name, output in zip(op.outputs, self._outputs(op), strict=True):
            if name is not None and output is not None:
                self._metas[name] = output.meta
                self.values[name] = Value(
                    name=name,
                    shape=output.meta.shape,
                    dtype=output.meta.dtype,
                    kind="activation",
                    requires_grad=output.meta.requires_grad,
                    alias_of="" if output.alias_of is None else inputs[output.alias_of],
                )
        self.ops.append(op)

    def is_identity(self, op: Op) -> bool:
        """Whether the op returns its first input as it is."""
        (output,) = self._outputs(op)
        return output is not None and output.alias_of == 0 and output.meta == self._metas[op.inputs[0]]

    def detached(self, op: Op) -> Op:
        """The op with every input that carries a gradient detached, each once."""
        for name in op.inputs:
            if self._metas[name].requires_grad and name not in self._detached:
                cut = f"{name}.detached"
                self.run(
                    replace(
                        op,
                        name=cut,
                        target="aten.detach.default",
                        args=(Ref(name),),
                        kwargs=(),
                        outputs=(cut,),
                        returns_sequence=False,
                    )
                )
                self._detached[name] = cut
        return _renamed(op, self._detached)

    def _outputs(self, op: Op) -> tuple[_Output | None, ...]:
        inputs = op.inputs
        call = substitute((op.args, op.kwargs), lambda ref: (Ref, inputs.index(ref.name)))
        key = (op.target, call, tuple(self._metas[name] for name in inputs))
        if key not in self._seen:
            self._seen[key] = self._run(op, inputs)
        return self._seen[key]

    def _run(self, op: Op, inputs: tuple[str, ...]) -> tuple[_Output | None, ...]:
        with self._mode:
            tensors = {name: _tensor(self._metas[name]) for name in inputs}
            args, kwargs = _call_arguments(op, tensors)
            result = resolve(op.target)(*args, **kwargs)
        results = tuple(result) if op.returns_sequence else (result,)
        storages = {storage_key(tensors[name]): i for i, name in enumerate(inputs)}
        return tuple(_output(item, storages) for item in results)


def _renamed(op: Op, names: Mapping[str, str]) -> Op:
    if names.keys().isdisjoint(op.inputs):
        return op
    args, kwargs = substitute((op.args, op.kwargs), lambda ref: Ref(names.get(ref.name, ref.name)))
    return replace(op, args=args, kwargs=kwargs)


def _call_arguments(op: Op, tensors: Mapping[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def torch_form(argument: Any) -> Any:
        if isinstance(argument, Ref):
            return tensors[argument.name]
        return [torch_form(item) for item in argument] if isinstance(argument, tuple) else literal(argument)

    return tuple(map(torch_form, op.args)), {key: torch_form(item) for key, item in op.kwargs}


def _tensor(meta: TensorMeta) -> Tensor:
    tensor = torch.empty_strided(meta.shape, meta.stride, dtype=getattr(torch, meta.dtype), device="cpu")
    return tensor.requires_grad_(meta.requires_grad)


def _output(result: Any, storages: Mapping[int, int]) -> _Output | None:
    if not isinstance(result, Tensor):
        return None
    return _Output(TensorMeta.of(result), storages.get(storage_key(result)))
