"""Runs a graph on real tensors, op by op: what every engine must be equal to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from shardstage.graph import ModelGraph, Ref
from shardstage.operators.resolve import literal, resolve


def run(
    graph: ModelGraph,
    state: Mapping[str, Tensor],
    batch: Mapping[str, Tensor],
    library: Mapping[str, Callable[..., Any]] | None = None,
) -> Tensor:
    """The graph's output; ``state`` holds parameters and buffers by the model's names, ``library`` operators that are not torch's."""
    own = library or {}
    env: dict[str, Any] = dict(batch)
    env.update({item.name: state[item.fqn] for item in (*graph.parameters, *graph.buffers)})
    for constant in graph.constants:
        value = graph.values[constant.name]
        elements = torch.tensor(constant.elements, dtype=getattr(torch, value.dtype))
        env[constant.name] = elements.reshape(value.shape)
    for op in graph.ops:
        kwargs = {key: _argument(item, env) for key, item in op.kwargs}
        function = own.get(op.target) or resolve(op.target)
        result = function(*(_argument(item, env) for item in op.args), **kwargs)
        for name, tensor in zip(op.outputs, result if op.returns_sequence else (result,), strict=True):
            if name is not None:
                env[name] = tensor
    output: Tensor = env[graph.output]
    return output


def _argument(argument: Any, env: Mapping[str, Any]) -> Any:
    if isinstance(argument, Ref):
        return env[argument.name]
    return [_argument(item, env) for item in argument] if isinstance(argument, tuple) else literal(argument)
