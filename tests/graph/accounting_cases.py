"""What a real run of a model computes and keeps, to hold the graph's accounts against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from shardstage.compat import storage_key
from shardstage.graph import ModelGraph
from shardstage.graph.capture_transformers import as_untraced
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


def measure(
    found: Case, *, around: Callable[[nn.Module], AbstractContextManager[Any]] = lambda _: nullcontext()
) -> Measured:
    """Runs the eager model. Saved storages count once each; parameters and buffers do not count."""
    model, batch = found.model.train(), {name: tensor.clone() for name, tensor in found.batch.items()}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[storage_key(tensor)] = tensor
        return tensor

    own = {storage_key(tensor) for tensor in (*model.parameters(), *model.buffers())}
    given = {storage_key(tensor) for tensor in batch.values()}
    counter = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
    with as_untraced(model, batch), around(model), counter:
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


def _attention_forward(q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _attention_backward(grad: Any, q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


# The counter knows the formula of fused attention, and not that CPUs have such a kernel.
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
