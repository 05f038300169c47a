"""How much memory a rank took at most, beyond what its libraries take."""

from __future__ import annotations

from pathlib import Path

import torch

__all__ = ["PeakMemory"]


class PeakMemory:
    """Measures from its creation: on CUDA the allocator's peak, on Linux the growth of the resident set.

    The resident set counts whole pages and what the C allocator keeps, so it lies a little above the bytes of the live tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._start_bytes = torch.cuda.memory_allocated(device)
        else:
            _forget_peak()
            self._start_bytes = _status_bytes("VmRSS")

    def peak_bytes(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._start_bytes
        return max(0, _status_bytes("VmHWM") - self._start_bytes)


def _forget_peak() -> None:
    """Sets the kernel's high-water mark of this program's resident set to its present size (proc(5), clear_refs)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _status_bytes(key: str) -> int:
    """A memory figure of /proc/self/status, in bytes; 0 where there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)
