"""What carries the calls of a group: the collectives that every carrier has, and what a reduction is.

Two carriers exist: shared memory among the ranks of one host, and gloo.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from enum import IntEnum
from typing import Any, Protocol

import torch
import torch.distributed as dist

from shardstage.errors import ProgramError

__all__ = ["Collectives", "CompletedWork", "Pipes", "Reduction", "reduce_into"]

_ROUNDED_ONCE = (torch.bfloat16, torch.float16)


class Collectives(Protocol):
    """What carries the collectives; tensors are contiguous and one-dimensional, None as Work means done."""

    def barrier(self) -> dist.Work | None: ...
    def all_reduce(self, tensor: torch.Tensor, reduction: Reduction) -> dist.Work | None: ...
    def reduce(self, tensor: torch.Tensor, reduction: Reduction, root: int) -> dist.Work | None: ...
    def all_gather(self, outputs: Sequence[torch.Tensor], tensor: torch.Tensor) -> dist.Work | None: ...
    def all_gather_single(self, output: torch.Tensor, tensor: torch.Tensor) -> dist.Work | None: ...
    def gather(
        self, outputs: Sequence[torch.Tensor] | None, tensor: torch.Tensor, root: int
    ) -> dist.Work | None: ...
    def reduce_scatter(
        self, output: torch.Tensor, tensors: Sequence[torch.Tensor], reduction: Reduction
    ) -> dist.Work | None: ...
    def reduce_scatter_single(
        self, output: torch.Tensor, tensor: torch.Tensor, reduction: Reduction
    ) -> dist.Work | None: ...
    def broadcast(self, tensor: torch.Tensor, root: int) -> dist.Work | None: ...
    def all_to_all(
        self, outputs: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor]
    ) -> dist.Work | None: ...
    def scatter(
        self, output: torch.Tensor, tensors: Sequence[torch.Tensor] | None, root: int
    ) -> dist.Work | None: ...


class Pipes(Protocol):
    """What carries point to point messages; source None is any rank."""

    def send(self, tensor: torch.Tensor, destination: int, tag: int) -> dist.Work: ...
    def receive(self, tensor: torch.Tensor, source: int | None, tag: int) -> dist.Work: ...
    def close(self) -> None: ...


class Reduction(IntEnum):
    """How the tensors of the ranks become one."""

    SUM = 0
    AVG = 1
    MAX = 2
    MIN = 3
    PRODUCT = 4
    BAND = 5
    BOR = 6
    BXOR = 7


class CompletedWork(dist.Work):
    """The Work of a collective that was done when its call returned; ``outputs`` is what its future holds."""

    def __init__(self, outputs: list[Any]) -> None:
        super().__init__()
        self._outputs = outputs

    def is_completed(self) -> bool:
        """True."""
        return True

    def is_success(self) -> bool:
        """True."""
        return True

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Returns True at once."""
        return True

    def synchronize(self) -> None:
        """Does nothing: there is no stream."""

    def exception(self) -> None:
        """None: an error was raised by the call."""

    def result(self) -> list[Any]:
        """The outputs."""
        return self._outputs

    def get_future(self) -> torch.futures.Future[Any]:
        """A completed future of the outputs."""
        future: torch.futures.Future[Any] = torch.futures.Future()
        future.set_result(self._outputs)
        return future


def reduce_into(out: torch.Tensor, sources: Sequence[torch.Tensor], reduction: Reduction) -> None:
    """Sets ``out`` to the reduction of ``sources``, from the first to the last; ``out`` may be one of them.

    SUM and AVG of two-byte floats are accumulated in fp32. Errors: ProgramError if the dtype cannot be so reduced.
    """
    operator = _OPERATORS[reduction]
    try:
        is_sum = reduction in (Reduction.SUM, Reduction.AVG)
        is_rounded_once = is_sum and out.dtype in _ROUNDED_ONCE
        if len(sources) == 1:
            out.copy_(sources[0])
        elif len(sources) == 2 and not (is_rounded_once and reduction is Reduction.AVG):
            operator(sources[0], sources[1], out=out)  # one addition rounds once anyway
            if reduction is Reduction.AVG:
                out.div_(2)
        else:
            total = sources[0].float() if is_rounded_once else sources[0].clone()
            for source in sources[1:]:
                operator(total, source, out=total)
            if reduction is Reduction.AVG:
                total.div_(len(sources))
            out.copy_(total)
    except (RuntimeError, TypeError) as error:
        raise ProgramError(
            f"{reduction.name} of {out.dtype} tensors does not exist: {error}",
            hint="reduce tensors of a float dtype, or move them as bytes: tensor.view(torch.uint8)",
        ) from error


_OPERATORS: tuple[Callable[..., torch.Tensor], ...] = (
    torch.add, torch.add, torch.maximum, torch.minimum, torch.mul,
    torch.bitwise_and, torch.bitwise_or, torch.bitwise_xor,
)  # fmt: skip
