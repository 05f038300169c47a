"""Which samples make the global batch of a step, and which of them belong to whom."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from shardstage.data.draws import permutation
from shardstage.errors import DataError


class BatchSampler:
    """The global order of samples, by step alone: no state to save, nothing that depends on a mesh.

    Epochs are laid end to end and cut in batches, so that a batch may span two epochs and every sample is
    used once per epoch:

        epoch    0 0 0 0 0 0 0 1 1 1 1 1 1 1 ...    num_samples = 7
        step     0 0 0 1 1 1 2 2 2 3 3 3 4 4 ...    global_batch = 3
    """

    def __init__(self, *, num_samples: int, global_batch: int, seed: int, shuffle: bool = True) -> None:
        if global_batch < 1:
            raise DataError(f"a global batch of {global_batch} samples is empty", hint="--batch 1")
        if num_samples < global_batch:
            raise DataError(
                f"the data has {num_samples} samples, but a global batch needs {global_batch}",
                hint=f"--batch {num_samples}"
                if num_samples
                else "paths = []  # the standard library's sources",
            )
        if seed < 0:
            raise DataError(f"the seed {seed} is negative", hint=f"seed = {-seed}")
        self.num_samples = num_samples
        self.global_batch = global_batch
        self.seed = seed
        self.shuffle = shuffle
        self._orders: dict[int, npt.NDArray[np.int64]] = {}

    def sample_ids(self, step: int) -> tuple[int, ...]:
        """Return the samples of the global batch of ``step``, in their global order."""
        if step < 0:
            raise IndexError(f"step {step} is negative")
        first = step * self.global_batch
        return tuple(self._sample_id(place) for place in range(first, first + self.global_batch))

    def epoch(self, step: int) -> float:
        """Return the number of epochs consumed before ``step``."""
        return step * self.global_batch / self.num_samples

    def _sample_id(self, place: int) -> int:
        epoch, offset = divmod(place, self.num_samples)
        return int(self._order(epoch)[offset]) if self.shuffle else offset

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        order = self._orders.get(epoch)
        if order is None:
            order = permutation(self.num_samples, self.seed, epoch)
            # A batch spans two epochs at most: keep this one and the last one asked for.
            self._orders = dict([*self._orders.items()][-1:]) | {epoch: order}
        return order


def shares(global_batch: int, weights_or_num: int | Sequence[float]) -> tuple[range, ...]:
    """Return which positions of the global batch belong to each data-parallel rank: contiguous, in order.

    A number means equal shares, the first ranks one sample larger when it does not divide. Weights mean
    shares in their proportion (largest remainder), with one sample at least for every positive weight.
    Raises DataError when there are fewer samples than ranks to feed.
    """
    weights = [1.0] * weights_or_num if isinstance(weights_or_num, int) else list(weights_or_num)
    num_fed = sum(weight > 0 for weight in weights)
    if num_fed == 0 or not all(0 <= weight < float("inf") for weight in weights):
        raise DataError(f"{weights_or_num} are no weights of a batch", hint="weights = [1.0, 1.0]")
    if global_batch < num_fed:
        raise DataError(
            f"a batch of {global_batch} samples cannot be shared by {num_fed}: one would get none",
            hint=f"--batch {num_fed}",
        )
    bounds = np.cumsum([0, *_proportional(global_batch, weights)]).tolist()
    return tuple(range(start, stop) for start, stop in pairwise(bounds))


def _proportional(total: int, weights: Sequence[float]) -> list[int]:
    """Whole sizes of sum ``total``: round down, then give what is left to the largest remainders."""
    exact = [total * weight / sum(weights) for weight in weights]
    sizes = [int(size) for size in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda rank: sizes[rank] - exact[rank])
    for rank in by_remainder[: total - sum(sizes)]:
        sizes[rank] += 1
    for rank, weight in enumerate(weights):
        if weight > 0 and sizes[rank] == 0:
            sizes[sizes.index(max(sizes))] -= 1
            sizes[rank] = 1
    return sizes
