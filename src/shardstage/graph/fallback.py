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

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shardstage.errors import CaptureError
from shardstage.graph.capture import capture, model_sizes
from shardstage.graph.capture_program import StoredNames
from shardstage.graph.capture_replay import TensorMeta
from shardstage.graph.fallback_record import record
from shardstage.graph.model_graph import ModelGraph, Op, Parameter, Ref, Value
from shardstage.graph.scale import markers
from shardstage.graph.skeleton import build_skeleton
from shardstage.graph.source import ModelSource
from shardstage.graph.tasks import Task
from shardstage.units import format_bytes

__all__ = ["capture_blocks", "capture_or_blocks", "module_library"]

_DEFAULT_SEQUENCE = 16
# Of parameters: what a laptop can hold twice.
_LARGEST_BYTES = 4 << 30

_Kind = Literal["input", "parameter", "buffer", "activation"]


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
    torch_dtype: torch.dtype = getattr(torch, dtype)
    model = _built(source).to(torch_dtype).train()
    if microbatch is not None:
        seen = record(model, source.task, microbatch, sequence, torch_dtype)
        return _Chain(model, source, torch_dtype).graph(
            seen.paths, seen.values, seen.loss, microbatch, sequence
        )
    return _scalable_graph(model, source, sequence or _DEFAULT_SEQUENCE, torch_dtype)


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


def _built(source: ModelSource) -> nn.Module:
    """A model of our own to run. Raises CaptureError for one that is too large to be built here."""
    num_bytes = sum(p.numel() * p.element_size() for p in build_skeleton(source.factory).parameters())
    if num_bytes > _LARGEST_BYTES:
        raise CaptureError(
            f"the model cannot be exported, and with {format_bytes(num_bytes)} is too large to be run here",
            hint="capture(factory) says which of its lines prevents the export",
        )
    return copy.deepcopy(source.factory())


def _scalable_graph(model: nn.Module, source: ModelSource, wanted: int, dtype: torch.dtype) -> ModelGraph:
    """The graph at marker sizes, by what three small batches have in common."""
    task, chain = source.task, _Chain(model, source, dtype)
    length = min(wanted, source.max_sequence or wanted)
    short = max(2, length // 2)
    sizes = model_sizes(model, source)
    marked = markers(sizes, sequence=length if task.has_sequence else None, max_sequence=source.max_sequence)
    base, more, longer = (record(model, task, b, s, dtype) for b, s in ((2, short), (3, short), (2, length)))
    rows = list(zip(base.values, more.values, longer.values, strict=False))
    shapes = [
        tuple(
            _marked_size(seen, marked, (short, length))
            for seen in zip(*(value.shape for value in row), strict=True)
        )
        for row in rows
    ]
    is_alike = base.paths == more.paths == longer.paths
    if not is_alike or any(size is None for shape in shapes for size in shape):
        return chain.graph(longer.paths, longer.values, longer.loss, 2, length if task.has_sequence else None)
    values = tuple(
        replace(value, shape=tuple(size for size in shape if size is not None))
        for value, shape in zip(base.values, shapes, strict=True)
    )
    graph = chain.graph(base.paths, values, base.loss, *marked)
    return replace(graph, is_scalable=True, is_sequence_scalable=marked[1] is not None)


def _marked_size(
    seen: tuple[int, ...], marked: tuple[int, int | None], lengths: tuple[int, int]
) -> int | None:
    """A size seen with 2 samples, with 3, and with 2 longer ones, as it would be at the markers; None if no rule fits."""
    two, three, long = seen
    (microbatch, sequence), (short, length) = marked, lengths
    if two == three:
        size, samples = two, 1
    elif 3 * two == 2 * three:
        size, samples = two // 2, microbatch
    else:
        return None
    if long == two:
        return samples * size
    if sequence is None or two * length != long * short or size % short:
        return None
    return samples * size // short * sequence


class _Chain:
    """Writes the ops and values of a graph whose ops are calls into ``model``."""

    def __init__(self, model: nn.Module, source: ModelSource, dtype: torch.dtype) -> None:
        self._model = model
        self._task = source.task
        self._dtype = dtype
        self._stored = StoredNames.of(model)
        tensors = {
            **dict(model.named_parameters()),
            **{name: buffer for name, buffer in model.named_buffers() if name in self._stored.ties},
        }
        self._names = {fqn: _value_name(fqn, tensor) for fqn, tensor in tensors.items()}
        self._values = {
            self._names[fqn]: _value(
                self._names[fqn], "parameter" if isinstance(t, nn.Parameter) else "buffer", TensorMeta.of(t)
            )
            for fqn, t in tensors.items()
        }

    def graph(
        self,
        paths: Sequence[str],
        hidden: Sequence[TensorMeta],
        loss: TensorMeta,
        microbatch: int,
        sequence: int | None,
    ) -> ModelGraph:
        """``hidden`` are the first block's input and what each block returns; without ``paths`` there is one op."""
        values = dict(self._values)
        for key, example in self._task.example_batch(microbatch, sequence).items():
            example = example.to(self._dtype) if example.is_floating_point() else example
            values[key] = _value(key, "input", replace(TensorMeta.of(example), requires_grad=False))
        for i, meta in enumerate(hidden):
            values[f"hidden{i}"] = _value(f"hidden{i}", "activation", meta)
        values["loss"] = _value("loss", "activation", loss)
        return ModelGraph(
            ops=tuple(self._ops(paths)),
            values=values,
            inputs=tuple(self._task.inputs),
            parameters=self._listed("parameter"),
            buffers=self._listed("buffer"),
            output="loss",
            microbatch=microbatch,
            sequence=sequence,
            notes=("no tensor of this model can be sharded: its ops are whole modules",),
        )

    def _listed(self, kind: str) -> tuple[Parameter, ...]:
        return tuple(
            Parameter(name=name, fqn=fqn, ties=self._stored.ties[fqn])
            for fqn, name in self._names.items()
            if self._values[name].kind == kind
        )

    def _ops(self, paths: Sequence[str]) -> Iterator[Op]:
        keys = tuple(self._task.inputs)
        outside = {fqn: name for fqn, name in self._names.items() if self._is_outside(fqn, paths)}
        call = (tuple(outside), tuple(map(Ref, outside.values())), keys, tuple(map(Ref, keys)))
        if not paths:
            yield Op(name="loss", target="shardstage.loss", args=call, outputs=("loss",))
            return
        chain = (tuple(paths), *call)
        yield Op(name="before", target="shardstage.before", args=chain, outputs=("hidden0",))
        for i, path in enumerate(paths):
            yield self._block(i, path)
        last = (*chain, Ref(f"hidden{len(paths)}"))
        yield Op(name="loss", target="shardstage.after", args=last, outputs=("loss",))

    def _block(self, index: int, path: str) -> Op:
        part = self._model.get_submodule(path)
        inside = tuple(name for name, _ in (*part.named_parameters(), *part.named_buffers()))
        tensors = tuple(Ref(self._names[self._stored.first[f"{path}.{name}"]]) for name in inside)
        return Op(
            name=path.replace(".", "_"),
            target="shardstage.module",
            args=(path, inside, tensors, Ref(f"hidden{index}")),
            outputs=(f"hidden{index + 1}",),
            module=path,
            module_type=type(part).__name__,
        )

    def _is_outside(self, fqn: str, paths: Sequence[str]) -> bool:
        """Whether the model holds the tensor, under any of its names, outside the blocks."""
        blocks = tuple(f"{path}." for path in paths)
        return not all(name.startswith(blocks) for name in (fqn, *self._stored.ties[fqn]))


def _value_name(fqn: str, tensor: Tensor) -> str:
    return f"{'p' if isinstance(tensor, nn.Parameter) else 'b'}_{fqn.replace('.', '_')}"


def _value(name: str, kind: _Kind, meta: TensorMeta) -> Value:
    return Value(name=name, shape=meta.shape, dtype=meta.dtype, kind=kind, requires_grad=meta.requires_grad)
