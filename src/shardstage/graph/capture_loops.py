"""``loops_over_tokens``: whether a model's code loops over its tokens op by op, so that its graph holds for one length only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from torch import nn
from torch.overrides import TorchFunctionMode

__all__ = ["loops_over_tokens"]

_LENGTHS: Final = (11, 17, 23)
"""Tokens, equally far apart: few, so that a model that loops over them is run in no time."""


def loops_over_tokens(model: nn.Module, run: Callable[[int], object]) -> bool:
    """Whether every token more takes equally many calls more; ``run`` runs the model on so many tokens, on tensors without data.

    A model that cannot be run so is not known to. It is left as it was, whatever its forward writes into its modules.
    """
    try:
        first, second = (_num_calls(model, run, length) for length in _LENGTHS[:2])
        return first < second and _num_calls(model, run, _LENGTHS[2]) - second == second - first
    except Exception:  # whatever the model's own code raises; its capture will say it
        return False


def _num_calls(model: nn.Module, run: Callable[[int], object], length: int) -> int:
    calls = _Calls()
    with _restored(model), calls:
        run(length)
    return calls.number


class _Calls(TorchFunctionMode):
    """Counts calls of torch's functions, and passes them on."""

    def __init__(self) -> None:
        super().__init__()
        self.number: int = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Afterwards every module has the attributes and buffers that it had."""
    before = [(held, dict(held)) for module in model.modules() for held in (vars(module), module._buffers)]
    try:
        yield
    finally:
        for held, kept in before:
            held.clear()
            held.update(kept)
