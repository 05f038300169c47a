"""The token stream: every document followed by eos, in one integer array.

document 0        document 1     document 2
t t t t t t t eos t t t t t eos  t t t ...
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np

from shardstage.data.tokenizer import ArrayTokenizer, TokenArray, Tokenizer
from shardstage.errors import DataError

_DOCUMENTS_AT_A_TIME = 256  # bounds the memory that text takes beside its tokens


def pack_documents(documents: Iterable[str], tokenizer: Tokenizer) -> TokenArray:
    """Return the stream ``[num_tokens]`` in the narrowest unsigned type that holds the vocabulary."""
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    end = np.array([tokenizer.eos_id], dtype=dtype)
    pieces = [np.empty(0, dtype=dtype)]
    for texts in _batched(documents, _DOCUMENTS_AT_A_TIME):
        for ids in _encode(texts, tokenizer):
            pieces += [ids.astype(dtype), end]
    return np.concatenate(pieces)


def cached_tokens(path: Path, documents: Iterable[str], tokenizer: Tokenizer) -> TokenArray:
    """Return the stream memory-mapped from ``path``, which is written first when it is not there.

    Ranks may race: each writes its own file and renames it, so ``path`` is never seen half written.
    """
    if not path.exists():
        _write(path, pack_documents(documents, tokenizer))
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)  # type: ignore[no-any-return]
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"the token cache {path} cannot be read: {error}", hint=f"rm -f {path}") from error


def _write(path: Path, tokens: TokenArray) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            np.save(file, tokens, allow_pickle=False)
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise DataError(
            f"the token cache {path} ({tokens.nbytes} bytes) cannot be written: {error.strerror or error}",
            hint=f"df -h {path.parent}",
        ) from error


def _encode(texts: Sequence[str], tokenizer: Tokenizer) -> list[TokenArray]:
    if isinstance(tokenizer, ArrayTokenizer):
        return tokenizer.encode_arrays(texts)
    return [np.asarray(tokenizer.encode(text), dtype=np.int64) for text in texts]


def _batched(documents: Iterable[str], size: int) -> Iterator[list[str]]:
    remaining = iter(documents)
    while batch := list(islice(remaining, size)):
        yield batch
