"""How the ranks of a group find out whether they can share memory, and open each other's segments."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import platform
import secrets
from collections.abc import Sequence

import torch.distributed as dist

from shardstage.runtime.shared_memory import (
    SLOTS_OFFSET_BYTES,
    Peer,
    Progress,
    SharedMemoryOptions,
    SharedSegments,
    create_mapping,
    open_mapping,
)

__all__ = ["connect"]


def connect(
    store: dist.Store,
    *,
    rank: int,
    size: int,
    labels: Sequence[str],
    options: SharedMemoryOptions,
    timeout_s: float,
    progress: Progress,
) -> SharedSegments | None:
    """Segments shared by all ranks of a group, or None, on every rank alike, if one of them cannot share.

    All ranks leave a card in the store, open each other's files and vote; a rank on another host or in another process
    namespace, an unsupported machine, different options: all mean None. ``labels`` name the ranks in errors.
    """
    fd, memory = (
        create_mapping(options.segment_bytes(size), "shardstage-segment")
        if _is_supported(options)
        else (-1, None)
    )
    try:
        nonce = secrets.token_hex(8)
        card = {"host": _host(), "pid": os.getpid(), "fd": fd, "nonce": nonce, "options": repr(options)}
        if memory is not None:
            memory[SLOTS_OFFSET_BYTES : SLOTS_OFFSET_BYTES + 16] = nonce.encode()
        store.set(f"shared_memory/card/{rank}", json.dumps(card))
        cards = [json.loads(store.get(f"shared_memory/card/{peer}")) for peer in range(size)]
        memories = None if memory is None else _open_all(cards, rank, memory, options.segment_bytes(size))
        store.set(f"shared_memory/vote/{rank}", "no" if memories is None else "yes")
        votes = [store.get(f"shared_memory/vote/{peer}") for peer in range(size)]
    finally:
        if fd >= 0:
            os.close(fd)
    if memories is None or any(vote != b"yes" for vote in votes):
        return None
    peers = [
        Peer(rank=peer, label=labels[peer], pid=card["pid"], pidfd=_pidfd(card["pid"]))
        for peer, card in enumerate(cards)
        if peer != rank
    ]
    return SharedSegments(
        rank=rank, memories=memories, peers=peers, options=options, timeout_s=timeout_s, progress=progress
    )


def _is_supported(options: SharedMemoryOptions) -> bool:
    return options.enabled and platform.machine() in ("x86_64", "AMD64") and hasattr(os, "memfd_create")


def _host() -> str:
    """Names the kernel and process namespace in which a pid and its files can be found."""
    with contextlib.suppress(OSError):
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{platform.node()} {file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    return f"{platform.node()} {secrets.token_hex(8)}"  # unknown: equal to no other


def _open_all(
    cards: Sequence[dict[str, str | int]], rank: int, memory: mmap.mmap, num_bytes: int
) -> list[mmap.mmap] | None:
    """Every rank's segment, or None if one cannot be opened or is not the file that its card promises."""
    memories = []
    for peer, card in enumerate(cards):
        if (
            card["fd"] == -1
            or card["host"] != cards[rank]["host"]
            or card["options"] != cards[rank]["options"]
        ):
            return None
        try:
            opened = memory if peer == rank else open_mapping(int(card["pid"]), int(card["fd"]), num_bytes)
        except (OSError, ValueError):
            return None
        if opened[SLOTS_OFFSET_BYTES : SLOTS_OFFSET_BYTES + 16] != str(card["nonce"]).encode():
            return None
        memories.append(opened)
    return memories


def _pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None
