"""``trace_saved``: which tensors autograd keeps from each op's forward to its backward, found by running the op without data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from shardstage.compat import FakeTensorMode, storage_key
from shardstage.graph.capture_targets import literal, resolve
from shardstage.graph.model_graph import ModelGraph, Op, Ref, Value, substitute
from shardstage.graph.mutation import mutated
from shardstage.units import dtype_bytes

__all__ = ["trace_saved"]


def trace_saved(graph: ModelGraph) -> ModelGraph:
    """The graph with ``Op.saved`` of every op, and a value ``<op>#saved<i>`` for what is neither an op's input nor its output.

    Each op runs under FakeTensors with gradients on, in order, so that memory layouts are as in a real run; ops that are equal up to
    names run once for all. Ops of our own (``shardstage.*``) keep what they say of themselves.
    """
    tracer = _Tracer(graph)
    ops = tuple(tracer.traced(op) for op in graph.ops)
    return replace(graph, ops=ops, values={**graph.values, **tracer.kept})


@dataclass(frozen=True, slots=True)
class _Meta:
    """All that an op's behaviour depends on in an input."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    requires_grad: bool


@dataclass(frozen=True, slots=True)
class _Kept:
    """A saved tensor: an input's or output's by its index, or one that only autograd knows."""

    place: Literal["input", "output", "own"]
    index: int = 0
    shape: tuple[int, ...] = ()
    dtype: str = ""


@dataclass(frozen=True, slots=True)
class _Result:
    strides: tuple[tuple[int, ...] | None, ...]
    kept: tuple[_Kept, ...]


class _Tracer:
    def __init__(self, graph: ModelGraph) -> None:
        self.kept: dict[str, Value] = {}
        self._values = graph.values
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._strides: dict[str, tuple[int, ...]] = {}
        self._seen: dict[Any, _Result] = {}

    def traced(self, op: Op) -> Op:
        if op.target.startswith("shardstage."):
            return op
        inputs = op.inputs
        metas = tuple(self._meta(name) for name in inputs)
        calls = substitute((op.args, op.kwargs), lambda ref: ("input", inputs.index(ref.name)))
        key = (op.target, calls, metas)
        result = self._seen.get(key)
        if result is None:
            result = self._seen[key] = self._run(op, metas)
        for name, stride in zip(op.outputs, result.strides, strict=True):
            if name is not None and stride is not None:
                self._strides[name] = stride
        return replace(op, saved=tuple(self._name(op, kept) for kept in result.kept))

    def _meta(self, name: str) -> _Meta:
        value = self._values[name]
        stride = self._strides.get(name) or _contiguous(value.shape)
        return _Meta(value.shape, stride, value.dtype, value.requires_grad)

    def _run(self, op: Op, metas: tuple[_Meta, ...]) -> _Result:
        packed: list[Tensor] = []

        def pack(tensor: Tensor) -> Tensor:
            packed.append(tensor)
            return tensor

        with self._mode, torch.enable_grad():
            tensors = {name: _tensor(meta) for name, meta in zip(op.inputs, metas, strict=True)}
            for name in mutated(op):
                tensors[name] = tensors[name].clone()  # a leaf cannot be changed in place
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                result = resolve(op.target)(
                    *_arguments(op.args, tensors), **_arguments(dict(op.kwargs), tensors)
                )
        results = tuple(result) if op.returns_sequence else (result,)
        packed += _recurrent_workspaces(op, tensors)
        places = {storage_key(tensors[name]): _Kept("input", i) for i, name in enumerate(op.inputs)}
        for index, item in enumerate(results):
            if isinstance(item, Tensor) and op.outputs[index] is not None:
                places.setdefault(storage_key(item), _Kept("output", index))
        strides = tuple(tuple(item.stride()) if isinstance(item, Tensor) else None for item in results)
        return _Result(strides, _places(packed, places))

    def _name(self, op: Op, kept: _Kept) -> str:
        if kept.place == "input":
            return op.inputs[kept.index]
        if kept.place == "output":
            name = op.outputs[kept.index]
            assert name is not None
            return name
        name = f"{op.name}#saved{kept.index}"
        self.kept[name] = Value(name=name, shape=kept.shape, dtype=kept.dtype, kind="saved")
        return name


def _places(packed: Sequence[Tensor], places: Mapping[int, _Kept]) -> tuple[_Kept, ...]:
    """Where each saved storage is found; autograd's own are numbered. Numbers that autograd wraps in tensors are left out."""
    found: dict[int, _Kept] = {}
    num_own = 0
    for tensor in packed:
        key = storage_key(tensor)
        if key in places:
            found[key] = places[key]
        elif key not in found and tensor.dim() > 0 and tensor.numel() > 0:
            found[key] = _own(tensor, num_own)
            num_own += 1
    return tuple(found.values())


def _own(tensor: Tensor, index: int) -> _Kept:
    """A tensor of autograd's own: in its shape, or flat where it is a part of a larger storage."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    numel = tensor.untyped_storage().nbytes() // dtype_bytes(dtype)
    shape = tuple(tensor.shape) if tensor.numel() == numel else (numel,)
    return _Kept("own", index, shape, dtype)


def _recurrent_workspaces(op: Op, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """What oneDNN's LSTM keeps besides, per layer and direction, which it tells only when it really runs.

    Fitted to torch 2.13, within 3 % on average: a step keeps 4 gates and 5 states of h features each, and 6 states of the wider of h and
    its input, in rows of good length for a cache; each of these regions is rounded up to pages of 4 KiB, which makes 20 KiB together.
    """
    if op.target != "aten.lstm.input":
        return []
    x, weights = tensors[op.args[0].name], [tensors[ref.name] for ref in op.args[2]]
    matrices = [weight for weight in weights if weight.dim() == 2]
    num_cells = op.args[4] * (2 if op.args[7] else 1)
    is_projected = len(matrices) != 2 * num_cells
    if is_projected or x.dtype == torch.float64 or not any(weight.requires_grad for weight in weights):
        return []
    sizes = ((weight.shape[0] // 4, weight.shape[1]) for weight in matrices[::2])  # [4 h, input]
    rows = [9 * h + 6 * _row(max(h, width)) for h, width in sizes]
    return [torch.empty(shape) for row in rows for shape in ((*x.shape[:2], row), (5 * 1024,))]


def _row(features: int) -> int:
    """Numbers in a row of float32: whole cache lines, and not a multiple of 1 KiB."""
    rounded = -(-features // 16) * 16
    return rounded + 16 if rounded % 256 == 0 else rounded


def _tensor(meta: _Meta) -> Tensor:
    tensor = torch.empty_strided(meta.shape, meta.stride, dtype=getattr(torch, meta.dtype), device="cpu")
    return tensor.requires_grad_(meta.requires_grad)


def _arguments(arguments: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(arguments, Ref):
        return tensors[arguments.name]
    if isinstance(arguments, tuple):
        return tuple(_arguments(item, tensors) for item in arguments)
    if isinstance(arguments, dict):
        return {key: _arguments(item, tensors) for key, item in arguments.items()}
    return literal(arguments)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    stride: list[int] = []
    step = 1
    for size in reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    return tuple(reversed(stride))
