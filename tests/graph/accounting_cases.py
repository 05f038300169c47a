"""What a real run of a model computes and keeps, to hold the graph's accounts against."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from shardstage.compat import TorchDispatchMode, storage_key
from shardstage.graph import ModelGraph
from shardstage.graph.capture_transformers import as_untraced
from shardstage.graph.recompute import StageRecompute, layer_modes
from shardstage.graph.saved import SELECTIVE_TARGETS
from shardstage.graph.source import ModelSource
from shardstage.graph.tasks import Task

MICROBATCH, SEQUENCE = 2, 32


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, its graph at the sizes of the batch, and the batch."""

    model: nn.Module
    task: Task
    graph: ModelGraph
    batch: Mapping[str, Tensor]


def case_of(source: ModelSource, marked: ModelGraph) -> Case:
    """From a graph captured at marker sizes."""
    sequence = SEQUENCE if source.task.has_sequence else None
    torch.manual_seed(0)
    return Case(
        model=source.factory(),
        task=source.task,
        graph=marked.at(microbatch=MICROBATCH, sequence=sequence),
        batch=source.task.random_batch(MICROBATCH, sequence, seed=1),
    )


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a real run of forward and backward on this CPU counted."""

    forward_flops: int
    backward_flops: int
    saved_bytes: int
    saved_input_bytes: int


def measure(found: Case) -> Measured:
    """Runs the eager model. Saved storages count once each; parameters and buffers do not count."""
    model, batch = found.model.train(), {name: tensor.clone() for name, tensor in found.batch.items()}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[storage_key(tensor)] = tensor
        return tensor

    own = {storage_key(tensor) for tensor in (*model.parameters(), *model.buffers())}
    given = {storage_key(tensor) for tensor in batch.values()}
    counter = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
    with as_untraced(model, batch), counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = found.task.loss(model, batch)
        forward = counter.get_total_flops()
        loss.backward()
    model.zero_grad(set_to_none=True)
    sizes = {key: tensor.untyped_storage().nbytes() for key, tensor in saved.items() if key not in own}
    return Measured(
        forward_flops=forward,
        backward_flops=counter.get_total_flops() - forward,
        saved_bytes=sum(size for key, size in sizes.items() if key not in given),
        saved_input_bytes=sum(size for key, size in sizes.items() if key in given),
    )


@dataclass(frozen=True, kw_only=True)
class MeasuredCheckpoint:
    """What a run with torch's checkpoint around each layer keeps alive between forward and backward, and computes in backward."""

    kept_bytes: int
    backward_flops: int


def measure_checkpoint(
    found: Case, layers: Sequence[nn.Module], recompute: StageRecompute
) -> MeasuredCheckpoint:
    """``kept_bytes`` are all storages made in the forward that still live when it ends."""
    model, batch = found.model.train(), {name: tensor.clone() for name, tensor in found.batch.items()}
    made = _MadeStorages()
    counter = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
    with as_untraced(model, batch), _checkpointed(layers, recompute):
        with made:
            loss = found.task.loss(model, batch)
        gc.collect()
        kept_bytes = made.live_bytes()
        with counter:
            loss.backward()
    model.zero_grad(set_to_none=True)
    return MeasuredCheckpoint(kept_bytes=kept_bytes, backward_flops=counter.get_total_flops())


class _MadeStorages(TorchDispatchMode):
    """Remembers every storage that an op makes, without keeping it alive."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {storage_key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and storage_key(tensor) not in given:
                storage = tensor.untyped_storage()
                self._made[storage_key(tensor)] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def live_bytes(self) -> int:
        return sum(num_bytes for reference, num_bytes in self._made.values() if not reference.expired())


@contextmanager
def _checkpointed(layers: Sequence[nn.Module], recompute: StageRecompute) -> Iterator[None]:
    modes = layer_modes(recompute, range(len(layers)))
    for layer, mode in zip(layers, modes, strict=True):
        if mode == "none":
            continue
        options = {} if mode == "full" else {"context_fn": _selective}
        run = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False, **options)
        layer.forward = run
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _policy(_: Any, op: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    is_kept = str(op) in SELECTIVE_TARGETS
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


_selective = partial(create_selective_checkpoint_contexts, _policy)


def _attention_forward(q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _attention_backward(grad: Any, q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


# The counter knows the formula of fused attention, and not that CPUs have such a kernel.
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
