"""The batches of one data-parallel rank, step by step, with a position that can be saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from shardstage.data.masking import IGNORED
from shardstage.data.sampler import BatchSampler, shares
from shardstage.data.source import Indexable, SampleSource, as_source
from shardstage.errors import DataError


@dataclass(frozen=True, kw_only=True, eq=False)
class Microbatch:
    """Samples that go through the model together.

    ``sample_ids`` number them in the data set, ``positions`` in the global batch; ``tensors`` are
    ``[b, ...]`` each; ``num_targets`` counts the labels that are not -100, or the samples without labels.
    """

    sample_ids: tuple[int, ...]
    positions: tuple[int, ...]
    tensors: dict[str, torch.Tensor]
    num_targets: int


class RankBatches:
    """The microbatches of one share of the global batch.

    ``share`` are positions in the global batch (see ``shares``); ``microbatches`` is their number or their
    sizes. Any step can be asked for; the position that ``state_dict`` saves is the step after the last one
    asked for. ``prefetch`` reads the next step in a thread: worth it for a slow source of your own.
    """

    def __init__(
        self,
        source: SampleSource | Indexable,
        sampler: BatchSampler,
        *,
        share: range,
        microbatches: int | Sequence[int],
        prefetch: bool = False,
    ) -> None:
        self.source = as_source(source)
        self.sampler = sampler
        self.next_step = 0
        self._microbatch_positions = _cut(share, microbatches)
        self._ahead = _ReadAhead(self._read) if prefetch else None
        if sampler.num_samples != self.source.num_samples:
            raise DataError(
                f"the sampler orders {sampler.num_samples} samples, the data has {self.source.num_samples}",
                hint=f"BatchSampler(num_samples={self.source.num_samples}, ...)",
            )
        if share.start < 0 or share.stop > sampler.global_batch:
            raise DataError(
                f"positions {share.start}..{share.stop - 1} leave a global batch of {sampler.global_batch}",
                hint=f"shares({sampler.global_batch}, num_ranks)",
            )

    def step(self, step: int) -> tuple[Microbatch, ...]:
        """Return the microbatches of ``step`` and move the position behind it."""
        batches = self._read(step) if self._ahead is None else self._ahead.read(step)
        self.next_step = step + 1
        return batches

    def close(self) -> None:
        """End the prefetching thread, if there is one."""
        if self._ahead is not None:
            self._ahead.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the position and what it is a position in; the same on every rank."""
        return {"next_step": self.next_step, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at a saved position. Raises DataError when it is one of other data or another order."""
        for name, here in self._identity().items():
            if name not in state or state[name] != here:
                raise _other_data(name, saved=state.get(name), here=here)
        self.next_step = int(state["next_step"])

    def _identity(self) -> dict[str, Any]:
        return {
            "fingerprint": self.source.fingerprint,
            "global_batch": self.sampler.global_batch,
            "seed": self.sampler.seed,
            "shuffle": self.sampler.shuffle,
        }

    def _read(self, step: int) -> tuple[Microbatch, ...]:
        sample_ids = self.sampler.sample_ids(step)
        return tuple(
            _collate(self.source, tuple(sample_ids[position] for position in positions), tuple(positions))
            for positions in self._microbatch_positions
        )


class _ReadAhead:
    """Reads a step, and the one after it in a thread. All reads are in that one thread, one at a time."""

    def __init__(self, read: Callable[[int], tuple[Microbatch, ...]]) -> None:
        self._read = read
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shardstage-data")
        self._pending: dict[int, Future[tuple[Microbatch, ...]]] = {}

    def read(self, step: int) -> tuple[Microbatch, ...]:
        future = self._pending.pop(step, None) or self._thread.submit(self._read, step)
        self._pending = {step + 1: self._thread.submit(self._read, step + 1)}
        return future.result()

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)


def _cut(share: range, microbatches: int | Sequence[int]) -> tuple[range, ...]:
    """Cut a share in microbatches, in order; equal ones (the first one larger if need be) for a number."""
    if isinstance(microbatches, int):
        if not 1 <= microbatches <= len(share):
            raise DataError(
                f"{len(share)} samples cannot be cut into {microbatches} microbatches",
                hint=f"microbatches = {max(1, min(microbatches, len(share)))}",
            )
        return tuple(share[part.start : part.stop] for part in shares(len(share), microbatches))
    if sum(microbatches) != len(share) or min(microbatches, default=0) < 1:
        raise DataError(
            f"microbatches of {tuple(microbatches)} samples do not make this share of {len(share)}",
            hint=f"microbatches = [{len(share)}]",
        )
    starts = [sum(microbatches[:number]) for number in range(len(microbatches))]
    return tuple(share[start : start + size] for start, size in zip(starts, microbatches, strict=True))


def _collate(source: SampleSource, sample_ids: tuple[int, ...], positions: tuple[int, ...]) -> Microbatch:
    samples = [source.sample(sample_id) for sample_id in sample_ids]
    try:
        tensors = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
    except (KeyError, RuntimeError) as error:
        raise DataError(
            f"samples {sample_ids} do not stack: {error}",
            hint="pad them to one shape, with labels -100 where there is nothing to predict",
        ) from error
    labels = tensors.get("labels")
    num_targets = len(samples) if labels is None else int((labels != IGNORED).sum())
    return Microbatch(sample_ids=sample_ids, positions=positions, tensors=tensors, num_targets=num_targets)


def _other_data(name: str, *, saved: Any, here: Any) -> DataError:
    what = {
        "fingerprint": "other data (text, tokenizer, objective or sequence)",
        "global_batch": "another global batch",
        "seed": "another seed",
        "shuffle": "another order",
    }[name]
    hint = {
        "fingerprint": "--resume with the paths, tokenizer and sequence of the run's run.toml",
        "global_batch": f"--batch {saved}",
        "seed": f"seed = {saved}",
        "shuffle": f"shuffle = {str(saved).lower()}",
    }[name]
    return DataError(f"the position was saved with {what}: {name} {saved!r}, here {here!r}", hint=hint)
