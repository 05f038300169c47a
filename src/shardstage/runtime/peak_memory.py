"""How much memory training takes on a rank at its peak, beyond what its libraries take."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import torch

from shardstage.runtime.c_allocator import give_back_free_memory

__all__ = ["PeakMemory", "resident_bytes"]


class PeakMemory:
    """Peak bytes of the steps between each ``begin`` and the last ``observe`` before the next.

    The steps after the first ``begin`` count only if there are no others: in them the optimizer makes its state, and libraries set up
    what they keep.

    CUDA: the allocator's own peak. CPU: the tensors that stay between steps (weights, gradients, optimizer state), plus the growth of
    the resident set within a step (activations and whatever else a step takes for a while). So neither libraries nor what they set up once
    is counted; whole pages, and free memory that the C allocator keeps between the tensors of a step, are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept_bytes = 0
        self._resident_bytes = 0
        self._peaks_bytes: list[int] = []

    @property
    def peak_bytes(self) -> int:
        warm = max(self._peaks_bytes[1:], default=0)
        return warm or max(self._peaks_bytes, default=0)

    def begin(self, kept_bytes: int) -> None:
        """Takes the memory of now as what stays between steps, ``kept_bytes`` of it in tensors."""
        self._peaks_bytes.append(0)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        self._kept_bytes = kept_bytes
        give_back_free_memory()
        _forget_peak()
        self._resident_bytes = _status_bytes("VmRSS")

    def observe(self) -> None:
        """Notes the peak since ``begin``."""
        if self._device.type == "cuda":
            peak_bytes = torch.cuda.max_memory_allocated(self._device)
        else:
            peak_bytes = self._kept_bytes + max(0, _status_bytes("VmHWM") - self._resident_bytes)
        self._peaks_bytes[-1] = max(self._peaks_bytes[-1], peak_bytes)


def resident_bytes() -> int:
    """Memory that this program has now (proc(5), statm); 0 where that is not known. Takes about 10 µs."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * _PAGE_BYTES
    except OSError:
        return 0


_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def _forget_peak() -> None:
    """Sets the kernel's high-water mark of this program's resident set to its present size (proc(5), clear_refs)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _status_bytes(key: str) -> int:
    """A memory figure of /proc/self/status, in bytes; 0 where there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)
