"""Writes a safetensors file one tensor at a time: the library's own writer wants them all in memory.

The format (https://github.com/huggingface/safetensors, "Format"): the length of the header as 8 bytes, little-endian; the header, JSON,
padded with spaces to a multiple of 8 bytes; the tensors' bytes, row-major and little-endian, without gaps.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from shardstage.errors import CheckpointError

__all__ = ["StoredTensor", "write_safetensors"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """What the header says of a tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(path: Path, stored: Sequence[StoredTensor], tensors: Iterable[Tensor]) -> None:
    """Writes ``tensors``, which are those of ``stored`` in order, each freed before the next; returns when they are on disk."""
    header = _header(stored)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for tensor in tensors:
            file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            del tensor
        file.flush()
        os.fsync(file.fileno())


def _header(stored: Sequence[StoredTensor]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in stored:
        stop = start + tensor.num_bytes
        entries[tensor.name] = {
            "dtype": _dtype_name(tensor.dtype),
            "shape": tensor.shape,
            "data_offsets": (start, stop),
        }
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def _dtype_name(dtype: torch.dtype) -> str:
    names = {
        torch.float64: "F64",
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.int64: "I64",
        torch.int32: "I32",
        torch.int16: "I16",
        torch.int8: "I8",
        torch.uint8: "U8",
        torch.bool: "BOOL",
    }
    if dtype not in names:
        raise CheckpointError(f"safetensors files hold no {dtype}", hint='dtype = "bfloat16"')
    return names[dtype]
