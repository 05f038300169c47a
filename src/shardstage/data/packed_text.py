"""Packed text: the token stream cut in windows of equal length, nothing padded, nothing lost but the tail."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from shardstage.data.config import DataConfig, Split
from shardstage.data.documents import find_documents, fingerprint_documents, read_documents
from shardstage.data.masking import mask_tokens
from shardstage.data.source import SampleSource
from shardstage.data.tokenizer import TokenArray, Tokenizer, load_tokenizer
from shardstage.data.tokens import cached_tokens, pack_documents
from shardstage.errors import DataError


class PackedText(SampleSource):
    """Samples ``{"input_ids": [S] int64, "labels": [S] int64}`` of one token stream.

    Causal windows share one token with the next, so that every token but the first is a target once:

        stream      a b c d e f g h i      S = 4
        window 0    a b c d                input_ids; labels are b c d e
        window 1            e f g h        input_ids; labels are f g h i

    ``labels[t]`` is the token *after* ``input_ids[t]``: they are already shifted.
    Of a sequence to sequence sample the labels are the S tokens after its input.
    Masked windows do not overlap; labels are -100 where there is nothing to predict.
    """

    def __init__(
        self,
        tokens: TokenArray,
        tokenizer: Tokenizer,
        config: DataConfig,
        *,
        fingerprint: str,
        split: Split = "train",
    ) -> None:
        """Cut ``tokens [num_tokens]``; ``fingerprint`` names the stream. Raises DataError when too short."""
        self.tokenizer = tokenizer
        self.config = config
        self.split = split
        self.num_tokens = len(tokens)
        self.vocab_size = tokenizer.vocab_size
        self._tokens = tokens
        self._mask_id = _require_mask(tokenizer, config) if config.objective == "masked" else -1
        self._windows = self._windows_of_split()
        self._fingerprint = _digest(
            fingerprint,
            config.objective,
            config.sequence,
            config.seed if config.objective == "masked" else "",  # draws nothing but the masks
            config.validation_ratio,
            split,
        )

    @classmethod
    def from_config(
        cls, config: DataConfig, *, split: Split = "train", cache_dir: Path | None = None
    ) -> PackedText:
        """Read, encode and cut the text that ``config`` names.

        The tokens live in memory; with ``cache_dir`` in a file there, mapped by all ranks of the host, named
        after the content and the tokenizer, so that it never goes stale.
        Raises DataError for text that is missing, unreadable, binary or too short.
        """
        files = find_documents(config.paths)
        tokenizer = load_tokenizer(config.tokenizer)
        fingerprint = _digest(fingerprint_documents(files), tokenizer.fingerprint)
        documents = read_documents(files)
        if cache_dir is None:
            tokens = pack_documents(documents, tokenizer)
        else:
            tokens = cached_tokens(cache_dir / f"tokens-{fingerprint}.npy", documents, tokenizer)
        return cls(tokens, tokenizer, config, fingerprint=fingerprint, split=split)

    @classmethod
    def from_texts(
        cls,
        texts: Iterable[str],
        config: DataConfig,
        *,
        tokenizer: Tokenizer | None = None,
        split: Split = "train",
    ) -> PackedText:
        """Pack these documents, already in memory, instead of the files that ``config`` names."""
        tokenizer = load_tokenizer(config.tokenizer) if tokenizer is None else tokenizer
        tokens = pack_documents((text for text in texts if text), tokenizer)
        fingerprint = _digest(hashlib.sha256(tokens.tobytes()).hexdigest(), tokenizer.fingerprint)
        return cls(tokens, tokenizer, config, fingerprint=fingerprint, split=split)

    @property
    def num_samples(self) -> int:
        """Number of windows in this split."""
        return len(self._windows)

    @property
    def fingerprint(self) -> str:
        """Digest of the text, the tokenizer, the objective, the sequence length and the split."""
        return self._fingerprint

    def sample(self, index: int) -> dict[str, torch.Tensor]:
        """Return ``input_ids [S]`` and ``labels [S]`` of one window."""
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        window_index, length = int(self._windows[index]), self.config.sequence
        start = window_index * length
        if self.config.objective == "causal":
            window = self._tokens[start : start + length + 1].astype(np.int64)
            inputs, labels = window[:-1].copy(), window[1:].copy()  # each its own storage
        elif self.config.objective == "seq2seq":
            window = self._tokens[start : start + 2 * length].astype(np.int64)
            inputs, labels = window[:length].copy(), window[length:].copy()
        else:
            inputs, labels = mask_tokens(
                self._tokens[start : start + length],
                seed=self.config.seed,
                index=window_index,
                vocab_size=self.vocab_size,
                mask_id=self._mask_id,
                eos_id=self.tokenizer.eos_id,
            )
        return {"input_ids": torch.from_numpy(inputs), "labels": torch.from_numpy(labels)}

    def _windows_of_split(self) -> TokenArray | range:
        """Windows of this split: of every 1 / validation_ratio windows, the last is for validation."""
        num_windows = (self.num_tokens - self._num_shared) // self.config.sequence
        if num_windows < 1:
            raise self._too_short()
        if self.config.validation_ratio == 0.0 and self.split == "train":
            return range(num_windows)
        passed = np.floor(np.arange(num_windows + 1) * self.config.validation_ratio)
        is_validation = np.diff(passed) > 0
        windows = np.flatnonzero(is_validation == (self.split == "validation"))
        if len(windows) == 0:
            raise DataError(
                f"validation_ratio {self.config.validation_ratio} of {num_windows} samples leaves none "
                f"for {self.split}",
                hint="validation_ratio = 0.5" if num_windows > 1 else f"--seq {self.config.sequence // 2}",
            )
        return windows

    @property
    def _num_shared(self) -> int:
        """Tokens of a sample that are the next one's input."""
        return {"causal": 1, "masked": 0, "seq2seq": self.config.sequence}[self.config.objective]

    def _too_short(self) -> DataError:
        needed = self.config.sequence + self._num_shared
        largest = self.num_tokens // 2 if self._num_shared > 1 else self.num_tokens - self._num_shared
        return DataError(
            f"the text has {self.num_tokens} tokens, but a sample of sequence {self.config.sequence} "
            f"needs {needed}",
            hint=f"--seq {largest}" if largest > 0 else "paths = []  # the standard library's sources",
        )


def _require_mask(tokenizer: Tokenizer, config: DataConfig) -> int:
    if tokenizer.mask_id is None:
        raise DataError(
            f"tokenizer {config.tokenizer!r} has no mask token, which the masked objective needs",
            hint='objective = "causal"',
        )
    return tokenizer.mask_id


def _digest(*parts: object) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:32]
