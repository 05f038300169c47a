"""``capture``: from an unmodified model to its graph, without memory for one weight."""

from __future__ import annotations

import io
import logging
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace

import torch
from torch import Tensor, nn

from shardstage.compat import FakeTensorMode
from shardstage.errors import CaptureError, ConfigError
from shardstage.graph.capture_depth import find_repeats, shallow
from shardstage.graph.capture_loops import loops_over_tokens
from shardstage.graph.capture_program import StoredNames, graph_of
from shardstage.graph.capture_replay import contiguous, replay
from shardstage.graph.capture_transformers import as_untraced
from shardstage.graph.model_graph import ModelGraph
from shardstage.graph.normalise import is_of_the_model, short_path
from shardstage.graph.saved_trace import trace_saved
from shardstage.graph.scale import at, markers
from shardstage.graph.skeleton import build_skeleton, fake_parameters
from shardstage.graph.source import ModelSource, source_of_model
from shardstage.graph.tasks import Task
from shardstage.graph.unfold import ShortGraph

__all__ = ["capture", "capture_short", "model_sizes"]

_DEFAULT_SEQUENCE = 128
# Torch knows the shapes of a recurrent layer only by running it step by step.
_UNROLLED_SEQUENCE = 31
# From here on a capture that finds out that a graph holds for one length only is worth sparing.
_LONG_SEQUENCE = 192
# Sizes at which a graph must still fit together to be called scalable: coprime to each other and unlike any marker.
_OTHER_MICROBATCH, _OTHER_SEQUENCE = 2, 48
_PREFIX = "model"
# Loggers of torch: the one names guards on data, the other has a traceback of torch's own for shapes that do not fit.
_TALKATIVE = ("torch.fx.experimental.symbolic_shapes", "torch._subclasses.fake_tensor")


def capture(
    model: nn.Module | Callable[[], nn.Module] | ModelSource,
    *,
    microbatch: int | None = None,
    sequence: int | None = None,
    task: Task | None = None,
    dtype: str = "float32",
) -> ModelGraph:
    """The graph of the model's training forward, from a batch to the sum of its losses, with parameters in ``dtype``.

    Without ``microbatch`` it is captured at marker sizes (``sequence`` says near which length) and can be had at others by
    ``graph.at``; with it, at exactly these sizes. A model without a task of its own needs one: ``batch_task(loss, batch)``.
    The model given is left as it was. Raises CaptureError, with the model's line, for what is no flat list of operators, ConfigError for
    samples longer than those that the model takes.
    """
    return _captured(model, microbatch, sequence, task, dtype)[1]


def capture_short(
    model: nn.Module | Callable[[], nn.Module] | ModelSource,
    *,
    microbatch: int | None = None,
    sequence: int | None = None,
    task: Task | None = None,
    dtype: str = "float32",
) -> ShortGraph:
    """``capture``'s graph in short: without the layers of a deep model that equal others. ``unfold()`` gives the graph."""
    return _captured(model, microbatch, sequence, task, dtype)[0]


def _captured(
    model: nn.Module | Callable[[], nn.Module] | ModelSource,
    microbatch: int | None,
    sequence: int | None,
    task: Task | None,
    dtype: str,
) -> tuple[ShortGraph, ModelGraph]:
    """The graph in short and in full; of a model whose layers are not what they seem, both in full."""
    source = _source(model, task)
    skeleton = model if isinstance(model, nn.Module) else build_skeleton(source.factory)

    def trace() -> ModelGraph:
        if microbatch is not None:
            return trace_saved(_capture_at(skeleton, source, microbatch, sequence, dtype))
        return trace_saved(_capture_scalable(skeleton, source, sequence or _DEFAULT_SEQUENCE, dtype))

    repeats = find_repeats(skeleton)
    if repeats:
        try:
            with shallow(skeleton, repeats):
                short = ShortGraph(graph=trace(), repeats=repeats)
            graph = short.unfold()
        except CaptureError:
            pass  # the whole model says whether the fault was the model's
        else:
            if _has_all_parameters(graph, skeleton):
                return short, graph
    graph = trace()
    return ShortGraph(graph=graph), graph


def _has_all_parameters(graph: ModelGraph, model: nn.Module) -> bool:
    found = {p.fqn: graph.values[p.name].shape for p in graph.parameters}
    return found == {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _capture_scalable(model: nn.Module, source: ModelSource, sequence: int, dtype: str) -> ModelGraph:
    """The graph at markers; where it does not scale with one of them, at one sample or at ``sequence`` tokens instead."""
    has_sequence = source.task.has_sequence
    wanted = min(sequence, source.max_sequence or sequence)
    limit = source.max_sequence
    if any(isinstance(module, nn.RNNBase) for module in model.modules()):
        limit = min(limit or _UNROLLED_SEQUENCE, _UNROLLED_SEQUENCE)
    sizes = tuple(model_sizes(model, source))
    microbatch, length = markers(sizes, sequence=wanted if has_sequence else None, max_sequence=limit)
    if length is not None and length > _LONG_SEQUENCE and _is_unrolled(model, source, dtype):
        length = None
    try:
        graph = _capture_at(model, source, microbatch, length if length is not None else wanted, dtype)
    except CaptureError:
        if not has_sequence or _runs(model, source, length or wanted, dtype):
            raise
        length = _shorter_marker(model, source, sizes, wanted, dtype)
        graph = _capture_at(model, source, microbatch, length if length is not None else wanted, dtype)
    is_scalable = _fits(replace(graph, is_scalable=True), _OTHER_MICROBATCH, graph.sequence)
    is_sequence_scalable = length is not None and _fits(
        replace(graph, is_sequence_scalable=True), microbatch, min(_OTHER_SEQUENCE, length // 2 + 1)
    )
    if not is_scalable or (length is not None and not is_sequence_scalable):
        length = length if is_sequence_scalable else wanted
        graph = _capture_at(model, source, microbatch if is_scalable else 1, length, dtype)
    return replace(graph, is_scalable=is_scalable, is_sequence_scalable=is_sequence_scalable)


def _shorter_marker(
    model: nn.Module, source: ModelSource, sizes: Sequence[int], wanted: int, dtype: str
) -> int | None:
    """A length to capture at for a model that fails at a marker: one that has as many positions as are wanted, say, and no more.

    None where it runs at the wanted length alone. Raises ConfigError where it does not run at that, and does at a shorter one:
    whole modules do no better.
    """
    if _runs(model, source, wanted, dtype):
        length = markers(sizes, sequence=wanted, max_sequence=wanted)[1]
        return length if length is not None and _runs(model, source, length, dtype) else None
    for shorter in (wanted >> power for power in range(1, wanted.bit_length())):
        if _runs(model, source, shorter, dtype):
            reason = _failure(model, source, wanted, dtype)
            raise ConfigError(
                f"the model takes {shorter} tokens, and fails with {wanted}: {reason}",
                hint=f"--seq {shorter}",
            )
    return None


def _runs(model: nn.Module, source: ModelSource, sequence: int, dtype: str) -> bool:
    """Whether the model takes samples of so many tokens; which numbers they are, nobody looks at."""
    return not _failure(model, source, sequence, dtype)


def _failure(model: nn.Module, source: ModelSource, sequence: int, dtype: str) -> str:
    """What the model says to samples of so many tokens, and where; nothing where it takes them."""
    try:
        _run(model, source, sequence, dtype)
    except Exception as error:  # whatever the model's own code raises
        return _told(error)
    return ""


def _run(model: nn.Module, source: ModelSource, sequence: int, dtype: str) -> None:
    """The loss of a batch without data."""
    faked = _faked(model, source, _OTHER_MICROBATCH, sequence, dtype)
    with faked as (batch, mode), _quiet(), mode, torch.no_grad():
        source.task.loss(model, batch)


def _is_unrolled(model: nn.Module, source: ModelSource, dtype: str) -> bool:
    return loops_over_tokens(model, lambda sequence: _run(model, source, sequence, dtype))


def _source(model: nn.Module | Callable[[], nn.Module] | ModelSource, task: Task | None) -> ModelSource:
    if isinstance(model, ModelSource):
        return model if task is None else replace(model, task=task)
    if isinstance(model, nn.Module):
        return source_of_model(model, task=task)
    return replace(source_of_model(build_skeleton(model), task=task), factory=model)


def model_sizes(model: nn.Module, source: ModelSource) -> Iterator[int]:
    """Every size that is the model's own, and the numbers of its configuration."""
    for tensor in (*model.parameters(), *model.buffers()):
        yield from tensor.shape
    for spec in source.task.inputs.values():
        yield spec.high
        yield from (size for size in spec.shape if isinstance(size, int))
    if hasattr(source.hf_config, "to_dict"):
        numbers = source.hf_config.to_dict().values()
        yield from (number for number in numbers if isinstance(number, int) and number != source.max_sequence)


def _fits(graph: ModelGraph, microbatch: int, sequence: int | None) -> bool:
    """Whether the ops, run at other sizes, make values of the shapes that the rule of ``at`` expects."""
    scaled = at(graph, microbatch=microbatch, sequence=sequence)
    try:
        made = replay(
            scaled.ops, {name: contiguous(v) for name, v in scaled.values.items() if v.kind != "activation"}
        )
    except (RuntimeError, ValueError, IndexError, TypeError):
        return False
    return all(scaled.values[name].shape == value.shape for name, value in made.items())


def _capture_at(
    model: nn.Module, source: ModelSource, microbatch: int, sequence: int | None, dtype: str
) -> ModelGraph:
    if not source.task.has_sequence:
        sequence = None
    stored = StoredNames.of(model)
    with _faked(model, source, microbatch, sequence, dtype) as (batch, _):
        program = _exported(_WithLoss(model, source.task), batch)
        return graph_of(
            program, stored, model, batch, prefix=_PREFIX, microbatch=microbatch, sequence=sequence
        )


@contextmanager
def _faked(
    model: nn.Module, source: ModelSource, microbatch: int, sequence: int | None, dtype: str
) -> Iterator[tuple[dict[str, Tensor], FakeTensorMode]]:
    """A batch without data, and its mode; while entered the model trains, and its parameters have no data either."""
    mode, torch_dtype = FakeTensorMode(allow_non_fake_inputs=True), getattr(torch, dtype)
    batch = _fake_batch(source.task.example_batch(microbatch, sequence), mode, torch_dtype)
    with _training(model), fake_parameters(model, mode, torch_dtype), as_untraced(model, batch):
        yield batch, mode


def _fake_batch(batch: Mapping[str, Tensor], mode: FakeTensorMode, dtype: torch.dtype) -> dict[str, Tensor]:
    with mode:
        return {
            name: torch.empty(
                tensor.shape, dtype=dtype if tensor.is_floating_point() else tensor.dtype, device="cpu"
            )
            for name, tensor in batch.items()
        }


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """The model in training mode; afterwards every module in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        yield
    finally:
        for module, is_training in modes:
            module.training = is_training


class _WithLoss(nn.Module):
    """What is exported: from the batch to the task's loss."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.add_module(_PREFIX, model)
        self._task = task

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self._task.loss(self.get_submodule(_PREFIX), batch)


def _exported(module: nn.Module, batch: dict[str, Tensor]) -> torch.export.ExportedProgram:
    try:
        with _quiet():
            return torch.export.export(module, (batch,), strict=False)
    except Exception as error:  # whatever the model's own code raises
        raise CaptureError(
            _told(error),
            hint="shardstage train falls back to whole modules (capture_or_blocks(source)), which nothing can price",
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the tracer's remarks: warnings, log lines, and on failure the whole graph on stderr. What matters is in its errors."""
    loggers = [*map(logging.getLogger, _TALKATIVE)]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _told(error: Exception) -> str:
    return f"{_reason(error)}\n  at {_line_of(error)}"


def _reason(error: Exception) -> str:
    kind = type(error).__name__
    if kind.startswith(("GuardOnDataDependent", "DataDependent", "DynamicOutputShape")):
        return "data-dependent control flow"
    lines = str(error).strip().splitlines()
    return f"{kind}: {lines[0] if lines else 'no message'}"


def _line_of(error: Exception) -> str:
    """``file:line: code`` of the innermost frame outside torch and this package."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if is_of_the_model(f.filename)]
    return f"{short_path(frames[-1].filename)}:{frames[-1].lineno}: {frames[-1].line}" if frames else "?"
