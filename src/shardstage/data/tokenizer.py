"""Tokenizers: bytes without any dependency, or one that was trained, from its files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from shardstage.errors import DataError

TokenArray = npt.NDArray[np.integer[Any]]

# What published tokenizer.json files call them, for those that come without a tokenizer_config.json.
_EOS_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[EOS]", "[SEP]")
_MASK_NAMES = ("[MASK]", "<mask>")


class Tokenizer(Protocol):
    """Text to token ids and back. ``mask_id`` is None when the vocabulary has no mask token."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def mask_id(self) -> int | None: ...
    @property
    def fingerprint(self) -> str: ...

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text`` without any special token."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids`` without its special tokens."""
        ...


@runtime_checkable
class ArrayTokenizer(Protocol):
    """A tokenizer that is faster with many documents at a time."""

    def encode_arrays(self, texts: Sequence[str]) -> list[TokenArray]:
        """Return one array of ids per text."""
        ...


def load_tokenizer(name: str = "bytes") -> Tokenizer:
    """Return the tokenizer of this name: ``bytes``, a tokenizer.json or its folder, or the name of a model.

    A model's name is looked up among the files already downloaded; nothing is fetched.
    Raises DataError when there is no such tokenizer or the library that reads it is missing.
    """
    if name == "bytes":
        return ByteTokenizer()
    path = Path(name).expanduser()
    if path.is_dir() and (path / "tokenizer.json").is_file():
        path = path / "tokenizer.json"
    return _from_file(path) if path.is_file() else _from_pretrained(str(path) if path.is_dir() else name)


class ByteTokenizer:
    """The 256 bytes of UTF-8, then bos, eos, pad and mask: reads any text, needs no file."""

    vocab_size: int = 260
    bos_id: int = 256
    eos_id: int = 257
    pad_id: int = 258
    mask_id: int | None = 259
    fingerprint: str = "bytes-260"

    def encode(self, text: str) -> list[int]:
        """Return the UTF-8 bytes of ``text``."""
        return list(text.encode())

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids``; a cut character at either end becomes U+FFFD."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def encode_arrays(self, texts: Sequence[str]) -> list[TokenArray]:
        """Return the UTF-8 bytes of each text as an array, without a Python object per byte."""
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]


class PretrainedTokenizer:
    """A tokenizer of the ``tokenizers`` library with the end and mask tokens it was trained with."""

    def __init__(self, backend: Any, *, eos_id: int, mask_id: int | None) -> None:
        self._backend = backend
        # Published files often truncate at the model's length or pad: both would change the text.
        backend.no_truncation()
        backend.no_padding()
        # "<|endoftext|>" written in a document is text there, not the end of the document.
        backend.encode_special_tokens = True
        self.eos_id = eos_id
        self.mask_id = mask_id
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.fingerprint = hashlib.sha256(f"{eos_id} {mask_id} {backend.to_str()}".encode()).hexdigest()[:32]

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text`` without any special token."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids`` without its special tokens."""
        return str(self._backend.decode(list(ids), skip_special_tokens=True))

    def encode_arrays(self, texts: Sequence[str]) -> list[TokenArray]:
        """Return the ids of each text; the library uses all cores."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings]


def _from_file(path: Path) -> Tokenizer:
    try:
        from tokenizers import Tokenizer as Backend
    except ImportError as error:
        raise _library_missing("tokenizers", str(path)) from error
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception
        raise DataError(
            f"{path} cannot be read as a tokenizer.json: {error}", hint='tokenizer = "bytes"'
        ) from error
    declared = _declared_specials(path.with_name("tokenizer_config.json"))
    eos_id = _first_id(backend, (*declared.get("eos_token", ()), *declared.get("sep_token", ()), *_EOS_NAMES))
    mask_id = _first_id(backend, (*declared.get("mask_token", ()), *_MASK_NAMES))
    return PretrainedTokenizer(backend, eos_id=_require_eos(eos_id, str(path)), mask_id=mask_id)


def _from_pretrained(name: str) -> Tokenizer:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise _library_missing("transformers", name) from error
    try:
        pretrained: Any = AutoTokenizer.from_pretrained(name, local_files_only=True)
    except (
        Exception
    ) as error:  # OSError, ValueError, KeyError, ImportError: whatever the folder's contents provoke
        raise DataError(
            f"tokenizer {name!r} is not 'bytes', a tokenizer.json, its folder or a downloaded model: "
            f"{_first_line(error)}",
            hint='tokenizer = "bytes"'
            if Path(name).exists()
            else f"hf download {name} --include 'tokenizer*'",
        ) from error
    backend = getattr(pretrained, "backend_tokenizer", None)
    if backend is None:
        raise DataError(
            f"tokenizer {name!r} has no fast version (tokenizer.json)", hint='tokenizer = "bytes"'
        )
    eos_id = pretrained.eos_token_id if pretrained.eos_token_id is not None else pretrained.sep_token_id
    return PretrainedTokenizer(backend, eos_id=_require_eos(eos_id, name), mask_id=pretrained.mask_token_id)


def _declared_specials(path: Path) -> dict[str, tuple[str, ...]]:
    """Return the special tokens of a tokenizer_config.json: each is a string or ``{"content": string}``."""
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}", hint=f"rm {path}") from error
    texts = {
        key: value["content"] if isinstance(value, dict) else value
        for key, value in config.items()
        if key.endswith("_token")
    }
    return {key: (text,) for key, text in texts.items() if isinstance(text, str)}


def _first_id(backend: Any, names: Iterable[str]) -> int | None:
    ids = (backend.token_to_id(name) for name in names)
    return next((found for found in ids if found is not None), None)


def _require_eos(eos_id: int | None, name: str) -> int:
    if eos_id is None:
        raise DataError(
            f"tokenizer {name} names no end-of-text token, so documents cannot be joined",
            hint='"eos_token": "</s>" in its tokenizer_config.json',
        )
    return eos_id


def _library_missing(library: str, name: str) -> DataError:
    return DataError(
        f"tokenizer {name!r} needs the package {library}, which is not installed",
        hint='pip install "shardstage[hf]"',
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
