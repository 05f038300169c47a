"""``resolve`` and ``literal``: from the words of a graph to torch's functions, dtypes and devices, and back."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch

from shardstage.errors import CaptureError

__all__ = ["literal", "plain", "resolve"]

# Operators that a library registers when one of its modules is imported.
_REGISTERED_BY = {"torchvision": "torchvision", "transformers": "transformers.integrations.moe"}


@cache
def resolve(target: str) -> Callable[..., Any]:
    """The function that torch calls ``target``: ``"aten.linear.default"``, or any other registered operator.

    Raises CaptureError where this torch has no such operator.
    """
    namespace, name, overload = target.split(".")
    if namespace in _REGISTERED_BY:
        importlib.import_module(_REGISTERED_BY[namespace])
    try:
        function: Callable[..., Any] = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    except AttributeError as error:
        raise CaptureError(
            f"torch {torch.__version__} has no operator {target!r}, which the graph calls",
            hint="capture the model again with this version of torch",
        ) from error
    return function


def literal(argument: Any, device: torch.device | str = "cpu") -> Any:
    """The argument that torch takes for a literal of a graph.

    Names of dtypes, layouts and memory formats become those; any device becomes ``device``; all else is itself.
    """
    if not isinstance(argument, str):
        return argument
    if argument.split(":")[0] in _DEVICES:
        return torch.device(device)
    return _WORDS.get(argument, argument)


def plain(argument: Any) -> Any:
    """The literal of a graph for one of torch's arguments, the inverse of ``literal``.

    Raises CaptureError for what no graph can hold, such as a generator or a size known only at run time.
    """
    if argument is None or isinstance(argument, bool | int | float | str):
        return argument
    if isinstance(argument, tuple | list):
        return tuple(plain(item) for item in argument)
    if isinstance(argument, torch.device):
        return argument.type
    if isinstance(argument, torch.dtype | torch.layout | torch.memory_format):
        return str(argument).removeprefix("torch.")
    raise CaptureError(
        f"the model passes {argument!r} to an operator, which is known only at run time",
        hint="python numbers, dtypes and devices can be captured",
    )


_DEVICES = frozenset({"cpu", "cuda", "meta", "xpu", "mps", "hpu"})


def _words() -> Mapping[str, Any]:
    words = (torch.dtype, torch.layout, torch.memory_format)
    return {
        str(item).removeprefix("torch."): item for item in vars(torch).values() if isinstance(item, words)
    }


_WORDS = _words()
