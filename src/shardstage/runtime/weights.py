"""The first values of a model's parameters and buffers, made or read one tensor at a time: no rank ever holds the full model.

Values come from the model's own initialisation under a seed, from a Hugging Face safetensors folder, or from a model that its factory
already filled. They do not depend on the plan: every rank, and the single-device reference, gets the same bits.
"""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from shardstage.errors import ConfigError
from shardstage.graph.skeleton import build_skeleton
from shardstage.layout import Placement, Replicate, Shard
from shardstage.runtime.weights_recording import InitRecording, draw_seed
from shardstage.runtime.weights_stream import stream_safetensors

if TYPE_CHECKING:
    from shardstage.graph.source import ModelSource

__all__ = ["initial_buffers", "initial_weights", "initialised_model", "local_part"]

_log = logging.getLogger(__name__)


def initial_weights(
    source: ModelSource,
    wanted: Mapping[str, Placement],
    *,
    tp_rank: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    folder: str | Path | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yields (fqn, this rank's tensor-parallel shard) of each wanted parameter, floating ones in ``dtype``, on the CPU.

    A tensor that is tied may be asked for under any of its names. Drawn from ``seed``, or read from the safetensors files in ``folder``.
    Holds at most one whole tensor at a time. Raises ConfigError for a name that the model lacks, CheckpointError for a ``folder`` that
    does not fit the model.
    """
    blueprint = _blueprint(source, seed)
    if folder is not None:
        yield from stream_safetensors(Path(folder), blueprint.model, wanted, tp_rank=tp_rank, dtype=dtype)
        return
    for fqn, placement in wanted.items():
        yield fqn, local_part(_cast(blueprint.value(fqn), dtype), placement, tp_rank)


def initial_buffers(
    source: ModelSource, wanted: Iterable[str], *, seed: int = 0
) -> Iterator[tuple[str, Tensor]]:
    """Yields (fqn, tensor) of each wanted buffer, whole, in the dtype of the model, on the CPU.

    ``seed`` matters only to a model that draws its buffers at random. Raises ConfigError for a name that the model lacks.
    """
    names = tuple(wanted)
    if not names:  # most models have none, and to build one takes a second
        return
    blueprint = _blueprint(source, seed)
    for fqn in names:
        yield fqn, blueprint.value(fqn)


def initialised_model(
    source: ModelSource, *, seed: int, dtype: torch.dtype | None = None, folder: str | Path | None = None
) -> nn.Module:
    """The whole model on the CPU with the values that ``initial_weights`` and ``initial_buffers`` give to ranks; ties kept.

    ``dtype`` is that of floating parameters (None: the model's own); the values are still drawn in the model's own.
    """
    blueprint = _blueprint(source, seed)
    model = copy.deepcopy(blueprint.model)  # the factory may have returned a model that its owner keeps
    fqns = {id(parameter): fqn for fqn, parameter in model.named_parameters()}
    streamed: dict[str, Tensor] = {}
    if folder is not None:
        whole = dict.fromkeys(fqns.values(), Replicate())
        streamed.update(stream_safetensors(Path(folder), model, whole, tp_rank=0, dtype=dtype))
    made: dict[int, nn.Parameter] = {}
    for module in list(model.modules()):
        for name, old in list(module._parameters.items()):
            if old is not None:
                if id(old) not in made:
                    fqn = fqns[id(old)]
                    value = streamed.pop(fqn) if fqn in streamed else _cast(blueprint.value(fqn), dtype)
                    made[id(old)] = nn.Parameter(value, requires_grad=old.requires_grad)
                setattr(module, name, made[id(old)])  # not in the dict: recurrent modules keep a second list
    for fqn, buffer in list(model.named_buffers()):
        if buffer.is_meta:
            parent, _, name = fqn.rpartition(".")
            setattr(model.get_submodule(parent), name, blueprint.value(fqn))
    return model


def local_part(tensor: Tensor, placement: Placement, tp_rank: int) -> Tensor:
    """The part of a whole tensor that ``tp_rank`` holds; a shard has memory of its own, so that the whole can be freed."""
    if not isinstance(placement, Shard):
        return tensor
    if tensor.size(placement.dim) != placement.length:
        raise ConfigError(
            f"{placement} does not fit a tensor of shape {tuple(tensor.shape)}",
            hint="make the plan again from this model",
        )
    parts = [
        tensor.narrow(placement.dim, start, stop - start) for start, stop in placement.intervals(tp_rank)
    ]
    return torch.cat(parts, dim=placement.dim)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Blueprint:
    """A model without its big tensors, and how to make each of them."""

    model: nn.Module
    recording: InitRecording
    seed: int

    def value(self, fqn: str) -> Tensor:
        tensor = self._tensors.get(fqn)
        if tensor is None:
            raise ConfigError(
                f"the model has no parameter or buffer {fqn!r}; it has {', '.join(list(self._tensors)[:3])}, …",
                hint="make the plan again from this model",
            )
        if not tensor.is_meta:
            return tensor.detach().clone()
        if not self.recording.has_value(tensor):
            _log.warning("%s is never initialised by the model: it starts as zeros", fqn)
        return self.recording.value(tensor, self.seed)

    @cached_property
    def _tensors(self) -> Mapping[str, Tensor]:
        parameters = self.model.named_parameters(remove_duplicate=False)
        return {**dict(parameters), **dict(self.model.named_buffers(remove_duplicate=False))}


def _blueprint(source: ModelSource, seed: int) -> _Blueprint:
    recording = InitRecording()
    try:
        with _seeded(seed), recording.running():
            model = build_skeleton(source.factory)
    except (NotImplementedError, RuntimeError) as error:
        _log.warning("the model cannot be built without its weights, so each rank builds it whole: %s", error)
        with _seeded(seed):
            model = source.factory()
    named = (*model.named_parameters(), *model.named_buffers())
    recording.name_draws((fqn, tensor) for fqn, tensor in named if tensor.is_meta)
    return _Blueprint(model=model, recording=recording, seed=seed)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """What a constructor draws for real is the same on every rank: all generators that it may use are seeded, and left as they were."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=()):
        number = draw_seed(seed, "constructor")
        torch.default_generator.manual_seed(number)
        random.seed(number)
        np.random.seed(number % 2**32)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)
