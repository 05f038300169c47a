"""All ranks of a group go on, or none: an error of one is raised on each."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from shardstage.errors import CheckpointError

__all__ = ["agree", "gathered", "is_first", "on_first"]

T = TypeVar("T")


def gathered(value: T, group: dist.ProcessGroup | None) -> list[T]:
    """Every rank's value, in rank order of the group."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def agree(action: Callable[[], T], group: dist.ProcessGroup | None, *, what: str) -> T:
    """Runs ``action`` on every rank; raises the CheckpointError of the first rank that failed on all of them."""
    result, error = _tried(action, what)
    first = next((found for found in gathered(error, group) if found is not None), None)
    if first is not None:
        raise first
    assert result is not None
    return result[0]


def on_first(action: Callable[[], T], group: dist.ProcessGroup | None, *, what: str) -> T:
    """Runs ``action`` on the group's first rank; every rank gets its result, or its CheckpointError."""
    outcome: tuple[tuple[T] | None, CheckpointError | None] = (None, None)
    if is_first(group):
        outcome = _tried(action, what)
    if dist.is_initialized():
        shared: list[Any] = [outcome]
        dist.broadcast_object_list(shared, src=_first_rank(group), group=group)
        outcome = shared[0]
    result, error = outcome
    if error is not None:
        raise error
    assert result is not None
    return result[0]


def is_first(group: dist.ProcessGroup | None) -> bool:
    return not dist.is_initialized() or dist.get_rank(group) == 0


def _first_rank(group: dist.ProcessGroup | None) -> int:
    return 0 if group is None else dist.get_global_rank(group, 0)


def _tried(action: Callable[[], T], what: str) -> tuple[tuple[T] | None, CheckpointError | None]:
    """(the result in a tuple, None), or (None, the error)."""
    try:
        return (action(),), None
    except CheckpointError as error:
        return None, error
    except Exception as error:
        return None, as_checkpoint_error(error, what)


def as_checkpoint_error(error: BaseException, what: str) -> CheckpointError:
    """``what`` could not be done because of ``error``."""
    hint = None
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = "free some space, or choose a folder on another disk; the checkpoint before is untouched"
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return CheckpointError(f"{what}: {reason}", hint=hint)
