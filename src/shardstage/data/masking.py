"""The masked objective of BERT (Devlin et al. 2018, §3.1): 15 % of the positions, of which 80/10/10."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from shardstage.data.draws import draw
from shardstage.data.tokenizer import TokenArray

IGNORED = -100  # torch.nn.functional.cross_entropy's default ignore_index
MASKED_RATIO = 0.15  # §3.1


def mask_tokens(
    window: TokenArray, *, seed: int, index: int, vocab_size: int, mask_id: int, eos_id: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return (input_ids, labels), both ``[S]`` int64, drawn from (seed, index) alone.

    The number of targets is fixed at 15 % of S, at least one, so that no sample is without loss; ends of
    documents are never targets. Of the targets 80 % show the mask, 10 % a random token and 10 % themselves.
    """
    length = len(window)
    keys, fates, randoms = draw(3 * length, seed, index).reshape(3, length)
    candidates = np.flatnonzero(window != eos_id)
    num_targets = min(max(1, round(MASKED_RATIO * length)), len(candidates))
    targets = candidates[np.argsort(keys[candidates], kind="stable")[:num_targets]]

    labels = np.full(length, IGNORED, dtype=np.int64)
    labels[targets] = window[targets]
    inputs = window.astype(np.int64)
    fate = fates[targets] % np.uint64(10)
    inputs[targets[fate < 8]] = mask_id
    replaced = targets[fate == 8]
    inputs[replaced] = randoms[replaced] % np.uint64(vocab_size)
    return inputs, labels
