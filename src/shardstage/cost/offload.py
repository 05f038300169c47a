"""What an optimizer that lives in the host's memory takes: seconds of its step, and whether its state fits there.

    g bytes an element down   the reduced gradients, to the host
    update                    AdamW over master weights and moments, at the host's memory bandwidth
    p bytes an element up     the new parameters, as wide as the device stores them

one after the other, as the engine runs them (Ren et al., "ZeRO-Offload", 2021, §4, overlaps them with more buffers). A device without a
host of its own, a CPU, moves both copies within its memory.
"""

from __future__ import annotations

from typing import Final

from shardstage.cluster import DeviceClass, HostShare
from shardstage.cost.compute import OPTIMIZER_PASSES, moved_s, optimizer_s

__all__ = ["has_host_room", "host_of", "offloaded_update_s"]

ASSUMED_HOST: Final = HostShare(
    link_bytes_per_s=1.25e10,
    memory_bytes_per_s=1.6e10,
    memory_bytes=2**62,
    source="a GPU of whose host nothing was said: PCIe 3.0 x16 (15.75 GB/s each way, PCI-SIG) and a channel of DDR4-2400 (19.2 GB/s), "
    "of both 0.8; memory without limit",
)

USABLE_HOST_RATIO: Final = 0.9
"""What loaders, the communication library's buffers and the operating system leave of the host's memory; our estimate."""


def host_of(device: DeviceClass) -> HostShare | None:
    """What a device has of its host; None where it is the host."""
    return device.host or (ASSUMED_HOST if device.kind == "cuda" else None)


def offloaded_update_s(
    num_elements: float, device: DeviceClass, *, down_bytes: int, up_bytes: int, element_bytes: int
) -> float:
    """Seconds from reduced gradients of ``num_elements`` on the device to their new parameters there; grows in proportion.

    A gradient's element takes ``down_bytes``, a parameter's ``up_bytes`` on the device and ``element_bytes`` in the optimizer.
    """
    host = host_of(device)
    if host is None:
        copied = 2.0 * num_elements * (down_bytes + up_bytes)
        return moved_s(copied, device) + num_elements * optimizer_s(1, element_bytes, 0, device)
    norm_s = moved_s(num_elements * down_bytes, device)
    travel_s = num_elements * (down_bytes + up_bytes) / host.link_bytes_per_s
    update_s = (OPTIMIZER_PASSES - 1) * num_elements * element_bytes / host.memory_bytes_per_s
    return norm_s + travel_s + update_s


def has_host_room(num_bytes: float, device: DeviceClass) -> bool:
    """Whether a rank's share of the host's memory holds so many bytes; a CPU's own memory is not told apart."""
    host = host_of(device)
    return host is None or num_bytes <= USABLE_HOST_RATIO * host.memory_bytes
