"""``capture_or_blocks``: the graph of any model; one that cannot be exported becomes a chain of whole modules.

    batch → before → layers.0 → layers.1 → … → after → loss       a Sequential or ModuleList of blocks in a row
    batch → loss                                                 anything else: one op

Such a graph serves data parallelism, ZeRO and, as a chain, pipelines; it shards no tensor. Its ops are calls into the model, so every
rank needs the model's code: ``module_library(source)`` has their callables.

    shardstage.module(path, names, tensors, x)             the submodule at ``path``, its tensors by its own names, applied to x
    shardstage.before(paths, names, tensors, keys, batch)  what the task and the model do before the first block: its input
    shardstage.after(paths, names, tensors, keys, batch, x)  what they do after the last block, which returned x: the summed loss
    shardstage.loss(names, tensors, keys, batch)           all of it
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from shardstage.errors import CaptureError
from shardstage.graph.capture import capture, model_sizes
from shardstage.graph.capture_program import StoredNames
from shardstage.graph.fallback_record import Record, record
from shardstage.graph.model_graph import ModelGraph, Op, Parameter, Ref, Value
from shardstage.graph.scale import markers
from shardstage.graph.skeleton import build_skeleton
from shardstage.graph.source import ModelSource
from shardstage.graph.tasks import Task

__all__ = ["capture_blocks", "capture_or_blocks", "module_library"]


def capture_or_blocks(
    source: ModelSource, *, microbatch: int | None = None, sequence: int | None = None, dtype: str = "float32"
) -> ModelGraph:
    """The graph of the source's model, by ``capture`` or, where that fails, of whole modules; its notes say which line was why."""
    try:
        return capture(source, microbatch=microbatch, sequence=sequence, dtype=dtype)
    except CaptureError as error:
        reason, _, line = error.message.partition("\n  at ")
        note = f"{line}: {reason}" if line else reason
    graph = capture_blocks(source, microbatch=microbatch, sequence=sequence, dtype=dtype)
    return replace(graph, notes=(note, *graph.notes))


def capture_blocks(
    source: ModelSource, *, microbatch: int | None = None, sequence: int | None = None, dtype: str = "float32"
) -> ModelGraph:
    """The model as calls of whole modules. It is built for real once and runs a tiny batch, to see who calls whom and with what.

    Raises CaptureError for a model whose forward fails on such a batch.
    """
    model = source.factory().to(getattr(torch, dtype)).train()
    task = source.task
    if microbatch is not None:
        seen = record(model, task, microbatch, sequence)
        return _graph(model, source, seen, seen.values, microbatch, sequence)
    wanted = min(sequence or 16, source.max_sequence or (1 << 62))
    marked = markers(
        model_sizes(model, source),
        sequence=wanted if task.has_sequence else None,
        max_sequence=source.max_sequence,
    )
    return _scalable_graph(model, source, marked, wanted)


def module_library(source: ModelSource) -> Mapping[str, Callable[..., Tensor]]:
    """The callables of a fallback graph's targets. The model is built without memory for its weights, which come as arguments."""
    model = build_skeleton(source.factory).train()
    task = source.task

    def module(path: str, names: Sequence[str], tensors: Sequence[Tensor], x: Tensor) -> Tensor:
        part = model.get_submodule(path)
        result: Tensor = torch.func.functional_call(part, dict(zip(names, tensors, strict=True)), (x,))
        return result

    def loss(names: Sequence[str], tensors: Sequence[Tensor], keys: Sequence[str], batch: Any) -> Tensor:
        bound = {f"model.{name}": tensor for name, tensor in zip(names, tensors, strict=True)}
        batch = dict(zip(keys, batch, strict=True))
        result: Tensor = torch.func.functional_call(_WithLoss(model, task), bound, (batch,))
        return result

    def before(paths: Sequence[str], *call: Any) -> Tensor:
        with _stopping_at(model.get_submodule(paths[0])):
            try:
                loss(*call)
            except _ReachedError as reached:
                return reached.value
        raise AssertionError("the first block was not called")

    def after(paths: Sequence[str], *call: Any) -> Tensor:
        *given, x = call
        with _answering([model.get_submodule(path) for path in paths], x):
            return loss(*given)

    return {
        "shardstage.module": module,
        "shardstage.loss": loss,
        "shardstage.before": before,
        "shardstage.after": after,
    }


class _WithLoss(nn.Module):
    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model = model
        self._task = task

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self._task.loss(self.model, batch)


class _ReachedError(Exception):
    """Carries the input of the first block out of the model."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value


@contextmanager
def _stopping_at(block: nn.Module) -> Iterator[None]:
    def stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise _ReachedError(args[0])

    with block.register_forward_pre_hook(stop):
        yield


@contextmanager
def _answering(blocks: Sequence[nn.Module], value: Tensor) -> Iterator[None]:
    """While entered, every block returns ``value`` and computes nothing."""
    with ExitStack() as stack:
        for block in blocks:
            block.forward = lambda *_, **__: value
            stack.callback(block.__dict__.pop, "forward")
        yield


def _scalable_graph(
    model: nn.Module, source: ModelSource, marked: tuple[int, int | None], length: int
) -> ModelGraph:
    """The graph at marker sizes, by what three small batches have in common."""
    microbatch, sequence = marked
    short = max(2, length // 2) if source.task.has_sequence else None
    first = record(model, source.task, 2, short)
    more_samples = record(model, source.task, 3, short)
    is_scalable = first.paths == more_samples.paths
    longer = record(model, source.task, 2, length) if sequence is not None and short != length else first
    shapes = [
        tuple(
            _marked_size(sizes, marked, (short, length))
            for sizes in zip(*(seen.values[i][0] for seen in (first, more_samples, longer)), strict=True)
        )
        for i in range(len(first.values))
        if is_scalable and first.paths == longer.paths
    ]
    if len(shapes) != len(first.values) or any(None in shape for shape in shapes):
        return _graph(model, source, first, first.values, 2, short)
    values = [(shape, dtype) for shape, (_, dtype) in zip(shapes, first.values, strict=True)]
    graph = _graph(model, source, first, values, microbatch, sequence)
    return replace(graph, is_scalable=True, is_sequence_scalable=sequence is not None)


def _marked_size(
    sizes: tuple[int, int, int], marked: tuple[int, int | None], lengths: tuple[int | None, int]
) -> int | None:
    """A size seen with 2 samples, with 3, and with 2 longer ones, as it would be at the markers; None if no rule fits."""
    two, three, long = sizes
    microbatch, sequence = marked
    size, power = (two, 0) if three == two else (two // 2, 1)
    if power and (three != 3 * size or two != 2 * size):
        return None
    if long == two or sequence is None:
        return int(size * microbatch**power)
    short, length = lengths
    if short is None or two * length != long * short or size % short:
        return None
    return int(size // short * sequence * microbatch**power)


def _graph(
    model: nn.Module,
    source: ModelSource,
    seen: Record,
    chain: Sequence[tuple[tuple[int | None, ...], str]],
    microbatch: int,
    sequence: int | None,
) -> ModelGraph:
    """The ops over a chain of values of these (shape, dtype)s: none at all, or the first block's input and each one's output."""
    stored = StoredNames.of(model)
    tensors = {
        **dict(model.named_parameters()),
        **{name: buffer for name, buffer in model.named_buffers() if name in stored.ties},
    }
    names = {
        fqn: f"{'p' if isinstance(t, nn.Parameter) else 'b'}_{fqn.replace('.', '_')}"
        for fqn, t in tensors.items()
    }
    values = {name: _stored_value(name, tensors[fqn]) for fqn, name in names.items()}
    for key, example in source.task.example_batch(microbatch, sequence).items():
        values[key] = Value(name=key, shape=tuple(example.shape), dtype=_dtype(example), kind="input")
    for i, (shape, dtype) in enumerate(chain):
        name = f"hidden{i}"
        sizes = tuple(size for size in shape if size is not None)
        values[name] = Value(name=name, shape=sizes, dtype=dtype, kind="activation", requires_grad=i > 0)
    values["loss"] = Value(
        name="loss", shape=(), dtype=seen.loss_dtype, kind="activation", requires_grad=True
    )
    parameters = [Parameter(name=n, fqn=f, ties=stored.ties[f]) for f, n in names.items()]
    return ModelGraph(
        ops=tuple(_ops(seen.paths, names, stored, tuple(source.task.inputs), model)),
        values=values,
        inputs=tuple(source.task.inputs),
        parameters=tuple(p for p in parameters if values[p.name].kind == "parameter"),
        buffers=tuple(p for p in parameters if values[p.name].kind == "buffer"),
        output="loss",
        microbatch=microbatch,
        sequence=sequence,
        notes=("no tensor of this model can be sharded: its ops are whole modules",),
    )


def _ops(
    paths: Sequence[str],
    names: Mapping[str, str],
    stored: StoredNames,
    keys: tuple[str, ...],
    model: nn.Module,
) -> Iterator[Op]:
    inputs = tuple(Ref(key) for key in keys)
    if not paths:
        everything = (tuple(names), tuple(map(Ref, names.values())), keys, inputs)
        yield Op(name="loss", target="shardstage.loss", args=everything, outputs=("loss",))
        return
    inside = {path: _names_inside(model, path) for path in paths}
    of_blocks = {stored.first[f"{path}.{name}"] for path, group in inside.items() for name in group}
    outside = {fqn: name for fqn, name in names.items() if fqn not in of_blocks}
    call = (tuple(paths), tuple(outside), tuple(map(Ref, outside.values())), keys, inputs)
    yield Op(name="before", target="shardstage.before", args=call, outputs=("hidden0",))
    for i, path in enumerate(paths):
        tensors = tuple(Ref(names[stored.first[f"{path}.{name}"]]) for name in inside[path])
        yield Op(
            name=path.replace(".", "_"),
            target="shardstage.module",
            args=(path, inside[path], tensors, Ref(f"hidden{i}")),
            outputs=(f"hidden{i + 1}",),
            module=path,
            module_type=type(model.get_submodule(path)).__name__,
        )
    yield Op(
        name="loss", target="shardstage.after", args=(*call, Ref(f"hidden{len(paths)}")), outputs=("loss",)
    )


def _names_inside(model: nn.Module, path: str) -> tuple[str, ...]:
    part = model.get_submodule(path)
    return tuple(name for name, _ in (*part.named_parameters(), *part.named_buffers()))


def _stored_value(name: str, tensor: Tensor) -> Value:
    is_parameter = isinstance(tensor, nn.Parameter)
    return Value(
        name=name,
        shape=tuple(tensor.shape),
        dtype=_dtype(tensor),
        kind="parameter" if is_parameter else "buffer",
        requires_grad=is_parameter and tensor.requires_grad,
    )


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
