"""``LiveTensors``: which storages are alive while operators run, and how many bytes they are, by category.

operator makes a storage    transient
its instruction ends        what of it is alive becomes what the instruction makes: activations, communication, ...
storage dies                a weak reference says so
"""

from __future__ import annotations

import heapq
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shardstage.compat import FakeTensor, storage_key

__all__ = ["HeldTensors", "LiveTensors"]

NUM_LARGEST = 8
TRANSIENT = "transient"


class HeldTensors(NamedTuple):
    """Tensors of one kind that are held at the same time: ``activations aten.mm bfloat16[8192,3584]``."""

    category: str
    made_by: str
    dtype: str
    shape: tuple[int, ...]
    num_tensors: int
    num_bytes: int

    def __str__(self) -> str:
        shape = ",".join(map(str, self.shape))
        times = f" × {self.num_tensors}" if self.num_tensors > 1 else ""
        return f"{self.category}: {self.dtype}[{shape}]{times}, made by {self.made_by}"


@dataclass(slots=True)
class _Storage:
    num_bytes: int
    category: str
    made_by: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    reference: Any


class LiveTensors:
    """``totals`` are bytes by category; ``begin`` and ``end`` bound an instruction, of which ``peak`` says when most was held."""

    def __init__(self) -> None:
        self.totals: Counter[str] = Counter()
        self.peak: Mapping[str, int] = {}
        self.largest: tuple[HeldTensors, ...] = ()
        self._storages: dict[int, _Storage] = {}
        self._fresh: set[int] = set()
        self._elsewhere: set[int] = set()
        self._total_bytes = 0
        self._peak_bytes = 0
        self._is_rising = False

    def begin(self) -> None:
        """From here on ``peak`` is new."""
        self._peak_bytes = self._total_bytes
        self._is_rising = True

    def end(self, category: str) -> None:
        """What was made since ``begin`` and is alive belongs to ``category``."""
        self._note_peak()
        for key in self._fresh:
            self._classify(key, category, only=TRANSIENT)
        self._fresh.clear()

    def add(self, tensor: Tensor, made_by: str) -> None:
        """Knows the storage of a tensor, unless it does already; one on meta has no bytes, and a DTensor's lie in its local tensor."""
        if type(tensor) is not FakeTensor or tensor.is_meta:
            return
        storage = tensor.untyped_storage()
        key = storage_key(tensor)
        if key in self._storages or key in self._elsewhere:
            return
        num_bytes = storage.nbytes()
        reference = weakref.ref(storage, partial(self._died, key))
        self._storages[key] = _Storage(
            num_bytes, TRANSIENT, made_by, tensor.dtype, tuple(tensor.shape), reference
        )
        self._fresh.add(key)
        self._change(TRANSIENT, num_bytes)

    def classify(self, tensors: Iterable[Tensor], category: str) -> int:
        """Puts the storages of tensors into a category; returns their bytes."""
        found: dict[int, None] = {}
        for tensor in tensors:
            self.add(tensor, category)
            found[storage_key(tensor)] = None
        return sum(self._classify(key, category) for key in found)

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """These stay, and take nothing of the device's memory."""
        for tensor in tensors:
            key = storage_key(tensor)
            known = self._storages.pop(key, None)
            self._elsewhere.add(key)
            self._fresh.discard(key)
            if known is not None:
                self._change(known.category, -known.num_bytes)

    def resized(self, storage: torch.UntypedStorage, num_bytes: int) -> None:
        """A storage is about to get a new size; only parameters that are gathered and freed do."""
        key = int(storage._cdata)
        known = self._storages.get(key)
        if known is not None:
            self._classify(key, "parameters")
            self._change("parameters", num_bytes - known.num_bytes)
            known.num_bytes = num_bytes

    def _classify(self, key: int, category: str, only: str | None = None) -> int:
        known = self._storages.get(key)
        if known is None or (only is not None and known.category != only):
            return 0
        self.totals[known.category] -= known.num_bytes
        self.totals[category] += known.num_bytes
        known.category = category
        return known.num_bytes

    def _died(self, key: int, _reference: Any) -> None:
        known = self._storages.get(key)
        if known is not None:
            self._change(known.category, -known.num_bytes)
            del self._storages[key]
            self._fresh.discard(key)

    def _change(self, category: str, num_bytes: int) -> None:
        if num_bytes < 0:
            self._note_peak()
        self.totals[category] += num_bytes
        self._total_bytes += num_bytes
        if self._total_bytes > self._peak_bytes:
            self._peak_bytes = self._total_bytes
            self._is_rising = True

    def _note_peak(self) -> None:
        """Before anything is freed: what is held now is the most since ``begin``."""
        if self._is_rising:
            self._is_rising = False
            self.peak = dict(self.totals)
            self.largest = tuple(self._largest())

    def _largest(self) -> list[HeldTensors]:
        found: dict[tuple[str, str, torch.dtype, tuple[int, ...]], tuple[int, int]] = {}
        for s in self._storages.values():
            kind = (s.category, s.made_by, s.dtype, s.shape)
            count, num_bytes = found.get(kind, (0, 0))
            found[kind] = (count + 1, num_bytes + s.num_bytes)
        largest = heapq.nlargest(NUM_LARGEST, found.items(), key=lambda item: item[1][1])
        return [
            HeldTensors(category, made_by, str(dtype).removeprefix("torch."), shape, count, num_bytes)
            for (category, made_by, dtype, shape), (count, num_bytes) in largest
        ]
