"""Where samples come from: a numbered, fingerprinted set of dicts of tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from shardstage.errors import DataError

_NUM_FINGERPRINTED = 16  # samples looked at when the user gives no fingerprint


@runtime_checkable
class SampleSource(Protocol):
    """Samples by index, always the same for an index. ``fingerprint`` changes when any sample does."""

    @property
    def num_samples(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...

    def sample(self, index: int) -> dict[str, torch.Tensor]:
        """Return one sample, without a batch dim. Raises IndexError outside ``range(num_samples)``."""
        ...


class Indexable(Protocol):
    """A list of dicts, a ``torch.utils.data.Dataset`` with a length, a Hugging Face dataset."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


class IndexedSource:
    """A source over the user's own indexable of dicts; values become tensors by ``torch.as_tensor``.

    Without a ``fingerprint`` it is made of the length and up to 16 evenly spaced samples: enough to notice
    another data set on resume, not to notice one changed sample.
    """

    def __init__(self, samples: Indexable, *, fingerprint: str | None = None) -> None:
        self._samples = samples
        self.num_samples = len(samples)
        if self.num_samples == 0:
            raise DataError("the data set is empty", hint="python -c 'print(len(samples))'")
        self.fingerprint = self._digest() if fingerprint is None else fingerprint

    def sample(self, index: int) -> dict[str, torch.Tensor]:
        """Return sample ``index`` as tensors."""
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        sample = self._samples[index]
        if not isinstance(sample, Mapping):
            raise DataError(
                f"sample {index} is a {type(sample).__name__}, not a dict of tensors",
                hint='{"input_ids": ids, "labels": labels}',
            )
        return {name: torch.as_tensor(value) for name, value in sample.items()}

    def _digest(self) -> str:
        digest = hashlib.sha256(str(self.num_samples).encode())
        for index in np.unique(np.linspace(0, self.num_samples - 1, _NUM_FINGERPRINTED, dtype=np.int64)):
            for name, tensor in sorted(self.sample(int(index)).items()):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(
                    tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                )
        return digest.hexdigest()[:32]


def as_source(samples: SampleSource | Indexable) -> SampleSource:
    """Return ``samples`` itself when it is a source, otherwise a source over it."""
    return samples if isinstance(samples, SampleSource) else IndexedSource(samples)
