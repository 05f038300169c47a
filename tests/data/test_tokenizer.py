"""Tokenizers: what goes in comes out, and what cannot be read is said."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from shardstage.data import ByteTokenizer, PretrainedTokenizer, load_tokenizer
from shardstage.errors import DataError

TEXT = "def shard(stage):\n    return stage  # a stage is a run of blocks\n"


def train_backend(*, specials: tuple[str, ...] = ("<|endoftext|>", "<mask>")) -> Backend:
    """A byte-level BPE tokenizer that, like many published ones, also truncates, pads and adds specials."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(specials), initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator([TEXT] * 4, trainer)
    if specials:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{specials[0]} $A {specials[0]}", special_tokens=[(specials[0], 0)]
        )
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    return backend


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    train_backend().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_bytes_decode_to_the_text_they_encode(text: str) -> None:
    text = text.encode(errors="replace").decode()
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_arrays([text])[0].tolist() == ids
    assert all(0 <= i < 256 for i in ids)


def test_the_specials_of_the_byte_tokenizer_are_the_last_ids_and_decode_to_nothing() -> None:
    tokenizer = ByteTokenizer()
    specials = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id]
    assert specials == list(range(256, tokenizer.vocab_size))
    assert tokenizer.decode([257, 104, 105, 259]) == "hi"


def test_a_folder_and_its_tokenizer_json_are_the_same_tokenizer(folder: Path) -> None:
    by_folder, by_file = load_tokenizer(str(folder)), load_tokenizer(str(folder / "tokenizer.json"))
    assert by_folder.fingerprint == by_file.fingerprint
    assert by_folder.encode(TEXT) == by_file.encode(TEXT)
    assert (by_folder.eos_id, by_folder.mask_id) == (0, 1)


def test_a_trained_tokenizer_neither_truncates_nor_pads_nor_adds_specials(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    ids = tokenizer.encode(TEXT)
    assert len(ids) > 4
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == TEXT
    assert isinstance(tokenizer, PretrainedTokenizer)
    assert tokenizer.encode_arrays([TEXT])[0].tolist() == ids


def test_the_end_of_text_written_in_a_document_is_text(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.eos_id not in tokenizer.encode("say <|endoftext|> twice")


def test_every_id_is_below_the_vocabulary_size(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    assert max(tokenizer.encode(TEXT)) < tokenizer.vocab_size <= 300


def test_tokenizer_config_names_the_end_of_text(folder: Path) -> None:
    config = {"eos_token": {"content": "d"}, "mask_token": "e", "pad_token": None, "model_max_length": 4}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer = load_tokenizer(str(folder))
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    assert (tokenizer.eos_id, tokenizer.mask_id) == (backend.token_to_id("d"), backend.token_to_id("e"))


def test_another_end_of_text_is_another_fingerprint() -> None:
    first = PretrainedTokenizer(train_backend(), eos_id=0, mask_id=1)
    second = PretrainedTokenizer(train_backend(), eos_id=5, mask_id=1)
    assert first.fingerprint != second.fingerprint


def test_a_folder_without_tokenizer_json_is_read_by_transformers(folder: Path) -> None:
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    model = json.loads(backend.to_str())["model"]
    older = folder / "older"
    older.mkdir()
    (older / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (older / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")
    (older / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    tokenizer = load_tokenizer(str(older))
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.eos_id == backend.token_to_id("<|endoftext|>")
    assert tokenizer.mask_id is None


def test_a_name_that_is_nothing_on_this_machine_is_named_with_a_way_to_get_it() -> None:
    with pytest.raises(DataError, match="'nobody/nothing' is not 'bytes'") as caught:
        load_tokenizer("nobody/nothing")
    assert caught.value.hint == "hf download nobody/nothing --include 'tokenizer*'"


def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match=r"tokenizer\.json cannot be read as a tokenizer\.json"):
        load_tokenizer(str(file))


def test_a_broken_tokenizer_config_is_named(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"tokenizer_config\.json cannot be read"):
        load_tokenizer(str(folder))


def test_a_tokenizer_without_an_end_of_text_is_refused(tmp_path: Path) -> None:
    train_backend(specials=()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="names no end-of-text token") as caught:
        load_tokenizer(str(tmp_path))
    assert caught.value.hint is not None and "eos_token" in caught.value.hint


@pytest.mark.parametrize(("library", "name"), [("tokenizers", "."), ("transformers", "gpt2")])
def test_a_missing_library_is_named_with_its_extra(
    library: str, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(DataError, match=f"needs the package {library}") as caught:
        load_tokenizer(name)
    assert caught.value.hint == 'pip install "shardstage[hf]"'


def test_a_tokenizer_without_a_fast_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def from_pretrained(name: str, **options: Any) -> object:
        return SimpleNamespace(eos_token_id=0)

    slow = SimpleNamespace(AutoTokenizer=SimpleNamespace(from_pretrained=from_pretrained))
    monkeypatch.setitem(sys.modules, "transformers", slow)
    with pytest.raises(DataError, match="'slow' has no fast version"):
        load_tokenizer("slow")
