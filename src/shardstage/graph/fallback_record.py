"""``record``: one small forward of a model, to see which of its blocks run in a row."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from shardstage.errors import CaptureError
from shardstage.graph.capture_replay import TensorMeta
from shardstage.graph.tasks import Task

__all__ = ["Record", "record"]


@dataclass(frozen=True, kw_only=True)
class Record:
    """``paths``: blocks that each read only what the one before returned; ``values``: the first's input and each one's output.

    Both are empty where no two blocks run in a row.
    """

    paths: tuple[str, ...]
    values: tuple[TensorMeta, ...]
    loss: TensorMeta


@dataclass(frozen=True, kw_only=True)
class _Call:
    module: nn.Module
    inputs: tuple[Tensor, ...]
    output: Any


def record(model: nn.Module, task: Task, microbatch: int, sequence: int | None, dtype: torch.dtype) -> Record:
    """What the model's blocks did for a batch of these sizes, its floats in ``dtype``.

    Raises CaptureError where the forward raises.
    """
    rows = {
        path: rows for path, rows in model.named_modules() if isinstance(rows, nn.Sequential | nn.ModuleList)
    }
    calls: list[_Call] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = tuple(item for item in (*args, *kwargs.values()) if isinstance(item, Tensor))
        calls.append(_Call(module=module, inputs=given, output=output))

    batch = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in task.random_batch(microbatch, sequence).items()
    }
    with ExitStack() as stack, torch.random.fork_rng(devices=()):
        for block in {block for row in rows.values() for block in row}:
            stack.enter_context(block.register_forward_hook(note, with_kwargs=True))
        try:
            loss = task.loss(model, batch)
        except Exception as error:  # whatever the model's own code raises
            raise CaptureError(
                f"the model fails on a batch of {microbatch} samples: {error}",
                hint="batch_task(loss, example_batch) says what the model reads",
            ) from error
    chains = [(path, _chain(row, calls)) for path, row in rows.items()]
    path, chain = max(chains, key=lambda item: len(item[1]), default=("", []))
    if len(chain) < 2:
        return Record(paths=(), values=(), loss=TensorMeta.of(loss))
    prefix = f"{path}." if path else ""
    return Record(
        paths=tuple(f"{prefix}{i}" for i in range(len(chain))),
        values=tuple(map(TensorMeta.of, (chain[0].inputs[0], *(call.output for call in chain)))),
        loss=TensorMeta.of(loss),
    )


def _chain(row: Sequence[nn.Module] | Any, calls: Sequence[_Call]) -> list[_Call]:
    """One call for each block of the row, if each was called once, in order, with nothing but the result of the one before."""
    blocks = list(row)
    found = [call for call in calls if any(call.module is block for block in blocks)]
    if [call.module for call in found] != blocks:
        return []
    is_single = all(len(call.inputs) == 1 and isinstance(call.output, Tensor) for call in found)
    is_chained = all(after.inputs[0] is before.output for before, after in pairwise(found))
    return found if is_single and is_chained else []
