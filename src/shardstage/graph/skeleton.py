"""``build_skeleton``: a model without memory for its weights; ``fake_parameters``: the user's model with weights that cost nothing.

build_skeleton(factory)     parameters on "meta", buffers real and right
fake_parameters(model, …)   for a while, parameters are FakeTensors on "cpu"; afterwards the model is as it was
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from shardstage.compat import FakeTensorMode
from shardstage.errors import ConfigError

__all__ = ["build_skeleton", "fake_parameters"]

# Layers of nn make their parameters with torch.empty; a tensor below this stays real, because some buffers begin the same way.
_EMPTY_FROM_ELEMENTS = 1 << 16
# Parameters that a model makes with values of its own. Tables in buffers are smaller, but for masks of a very long context.
_FILLED_FROM_ELEMENTS = 1 << 20
_FILLED = (torch.rand, torch.randn, torch.zeros, torch.ones)


def build_skeleton(factory: Callable[[], nn.Module]) -> nn.Module:
    """The factory's model with its large parameters on "meta", ties kept, and its buffers real, with the values that they have there.

    Takes time and memory by the number of modules, not of weights. A model whose buffers would land on "meta" is built again with
    more of its tensors real. The random state of torch is left as it was. Raises ConfigError for a factory that makes no module.
    """
    with torch.random.fork_rng(devices=()):
        for filled in (_FILLED, ()):
            with _LargeTensorsOnMeta(filled):
                model = factory()
            if not isinstance(model, nn.Module):
                raise ConfigError(
                    f"the factory made a {type(model).__name__}, which is no model",
                    hint="def factory() -> torch.nn.Module: ...",
                )
            if not any(buffer.is_meta for buffer in model.buffers()):
                return model
        return factory()


@contextmanager
def fake_parameters(
    model: nn.Module, mode: FakeTensorMode, dtype: torch.dtype | None = None
) -> Iterator[None]:
    """While entered, every parameter of the model is a FakeTensor on "cpu"; tied ones are one tensor still.

    Floating parameters take ``dtype`` where given. In float64 the running statistics of normalisations follow, for no kernel mixes
    them with float64; all other buffers are left alone. On exit the model holds its own tensors again.
    """
    replaced: dict[int, nn.Parameter] = {}
    parameters = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
    ]
    statistics = list(_running_statistics(model)) if dtype == torch.float64 else []
    try:
        for module, name, parameter in parameters:
            if id(parameter) not in replaced:
                replaced[id(parameter)] = _fake(parameter, mode, dtype)
            setattr(module, name, replaced[id(parameter)])
        for module, name, buffer in statistics:
            setattr(module, name, buffer.to(torch.float64))
        yield
    finally:
        for module, name, tensor in (*parameters, *statistics):
            setattr(module, name, tensor)


class _LargeTensorsOnMeta(TorchFunctionMode):
    """Sends large new tensors to "meta"."""

    def __init__(self, filled: tuple[Callable[..., Any], ...]) -> None:
        super().__init__()
        self._filled = filled

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and _num_elements(args, kwargs) >= _EMPTY_FROM_ELEMENTS:
            kwargs = {**kwargs, "device": "meta"}
        elif func in self._filled and _num_elements(args, kwargs) >= _FILLED_FROM_ELEMENTS:
            kwargs = {**kwargs, "device": "meta"}
        elif func is torch.full and math.prod(_size(args, kwargs)) >= _FILLED_FROM_ELEMENTS and self._filled:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def _num_elements(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Elements of ``torch.empty(2, 3)``, ``torch.empty((2, 3))`` and ``torch.empty(size=(2, 3))``."""
    size = args if args and isinstance(args[0], int) else _size(args, kwargs)
    return math.prod(length for length in size if isinstance(length, int))


def _size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
    size = args[0] if args else kwargs.get("size", ())
    return tuple(size) if isinstance(size, tuple | list) else (size,)


def _fake(parameter: nn.Parameter, mode: FakeTensorMode, dtype: torch.dtype | None) -> nn.Parameter:
    kept = dtype if dtype is not None and parameter.is_floating_point() else parameter.dtype
    with mode:
        tensor = torch.empty(parameter.shape, dtype=kept, device="cpu")
    return nn.Parameter(tensor, requires_grad=parameter.requires_grad)


def _running_statistics(model: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name.startswith("running_") and buffer.is_floating_point():
                yield module, name, buffer
