"""What the C allocator does with memory that was freed (glibc only; elsewhere nothing is changed)."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from typing import Final

__all__ = ["give_back_free_memory", "keep_freed_memory"]

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
"""Numbers of options of mallopt (malloc.h)."""
_LARGEST_MMAP_THRESHOLD_BYTES: Final = 32 * 1024**2
_NEVER_TRIM: Final = -1
"""As the unsigned number that it becomes: more than there is."""


def give_back_free_memory() -> None:
    """Else what was built and is free by now would hide how much what follows takes (malloc_trim(3))."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def keep_freed_memory() -> None:
    """Has the C allocator keep what is freed for what comes next, which else asks for its pages anew (mallopt(3)).

    A page's first touch took 15 µs in a virtual machine whose host takes free pages back: a tenth of the CPU seconds of a training step of
    benchmarks/planner/local, 2 to 4 % of a search for a plan. What is larger than 32 MiB, the allocator's limit, goes back all the same.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _NEVER_TRIM)
