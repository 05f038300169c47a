"""Packed text: nothing is lost, labels are shifted, masks follow the rule, short text is refused."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardstage.data import ByteTokenizer, DataConfig, PackedText, Tokenizer
from shardstage.data.tokens import pack_documents
from shardstage.errors import DataError

TEXTS = ("the quick brown fox", "jumps over", "the lazy dog " * 40)
documents = st.lists(st.text(st.characters(codec="utf-8"), min_size=1), min_size=1, max_size=8)


class Letters:
    """A user's own tokenizer: no arrays, no mask."""

    vocab_size = 70_000
    eos_id = 69_999
    mask_id: int | None = None
    fingerprint = "letters"

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, ids: object) -> str:
        raise NotImplementedError


def packed(
    texts: tuple[str, ...] = TEXTS, *, tokenizer: Tokenizer | None = None, **config: object
) -> PackedText:
    return PackedText.from_texts(texts, DataConfig(**config), tokenizer=tokenizer)  # type: ignore[arg-type]


def stream_of(source: PackedText) -> list[int]:
    """The tokens as the samples show them: the first one, then every target."""
    samples = [source.sample(index) for index in range(source.num_samples)]
    return [int(samples[0]["input_ids"][0]), *torch.cat([sample["labels"] for sample in samples]).tolist()]


@settings(max_examples=50, deadline=None)
@given(documents)
def test_packing_loses_nothing(texts: list[str]) -> None:
    tokenizer = ByteTokenizer()
    tokens = pack_documents(iter(texts), tokenizer)
    ends = np.flatnonzero(tokens == tokenizer.eos_id)
    assert [tokenizer.decode(part.tolist()) for part in np.split(tokens, ends + 1)[:-1]] == texts
    assert ends[-1] == len(tokens) - 1


@settings(max_examples=50, deadline=None)
@given(documents, st.integers(1, 9))
def test_every_token_is_a_target_once_but_for_the_first_and_the_tail(texts: list[str], sequence: int) -> None:
    tokens = pack_documents(texts, ByteTokenizer()).tolist()
    if len(tokens) <= sequence:
        sequence = len(tokens) - 1
    stream = stream_of(packed(tuple(texts), sequence=sequence))
    assert stream == tokens[: len(stream)]
    assert len(tokens) - len(stream) < sequence


def test_labels_are_the_next_tokens() -> None:
    source = packed(sequence=7)
    sample, following = source.sample(0), source.sample(1)
    assert sample["input_ids"].dtype == sample["labels"].dtype == torch.int64
    assert sample["input_ids"].shape == sample["labels"].shape == (7,)
    assert torch.equal(sample["input_ids"][1:], sample["labels"][:-1])
    assert sample["labels"][-1] == following["input_ids"][0]


def test_a_sample_is_its_own_to_change() -> None:
    source = packed(sequence=8)
    before = source.sample(1)
    source.sample(1)["input_ids"].fill_(0)
    changed = source.sample(1)
    assert torch.equal(changed["input_ids"], before["input_ids"])
    before["labels"].fill_(0)
    assert before["input_ids"].any()


def test_a_large_vocabulary_keeps_its_ids() -> None:
    assert stream_of(packed(("ab", "𐀀"), tokenizer=Letters(), sequence=2)) == [97, 98, 69_999, 65_536, 69_999]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.integers(8, 64))
def test_masks_follow_the_rule_of_bert(seed: int, sequence: int) -> None:
    source = packed(objective="masked", sequence=sequence, seed=seed)
    plain = pack_documents(TEXTS, ByteTokenizer()).astype(np.int64)
    for index in range(source.num_samples):
        sample = source.sample(index)
        original = torch.from_numpy(plain[index * sequence : (index + 1) * sequence])
        is_target = sample["labels"] != -100
        assert is_target.sum() == max(1, round(0.15 * sequence))
        assert torch.equal(sample["labels"][is_target], original[is_target])
        assert torch.equal(sample["input_ids"][~is_target], original[~is_target])
        assert not (sample["labels"] == source.tokenizer.eos_id).any()
        assert 0 <= sample["input_ids"].min() and sample["input_ids"].max() < source.vocab_size


def test_four_of_five_targets_show_the_mask_and_one_of_ten_itself() -> None:
    source = packed(("abcdefghij" * 20_000,), objective="masked", sequence=200)
    masked = kept = total = 0
    for index in range(source.num_samples):
        sample = source.sample(index)
        is_target = sample["labels"] != -100
        shown, wanted = sample["input_ids"][is_target], sample["labels"][is_target]
        total += len(shown)
        masked += int((shown == source.tokenizer.mask_id).sum())
        kept += int((shown == wanted).sum())
    # 30,000 targets: four standard deviations are 0.0092 for 0.8 and 0.0070 for 0.1 (+ 1 / 260 drawn as themselves).
    assert total == 30_000
    assert abs(masked / total - 0.8 - 0.1 / 260) < 0.0093
    assert abs(kept / total - 0.1 - 0.1 / 260) < 0.0070


def test_a_mask_depends_on_the_seed_and_the_sample_alone() -> None:
    first, again = packed(objective="masked", seed=3), packed(objective="masked", seed=3)
    again.sample(2)
    assert torch.equal(first.sample(1)["labels"], again.sample(1)["labels"])
    assert torch.equal(first.sample(1)["input_ids"], again.sample(1)["input_ids"])
    other = packed(objective="masked", seed=4)
    assert not torch.equal(first.sample(1)["labels"], other.sample(1)["labels"])


@pytest.mark.parametrize("objective", ["causal", "masked"])
@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.5, 0.9])
def test_training_and_validation_share_no_window_and_lose_none(objective: str, ratio: float) -> None:
    config = DataConfig(objective=objective, sequence=8, validation_ratio=ratio)  # type: ignore[arg-type]
    train = PackedText.from_texts(TEXTS, config)
    validation = PackedText.from_texts(TEXTS, config, split="validation")
    whole = packed(objective=objective, sequence=8)
    assert train.num_samples + validation.num_samples == whole.num_samples
    assert abs(validation.num_samples - ratio * whole.num_samples) < 1 + 1e-9
    windows = sorted(int(index) for source in (train, validation) for index in source._windows)
    assert windows == list(range(whole.num_samples))


def test_the_fingerprint_follows_everything_that_changes_a_sample() -> None:
    config = DataConfig(validation_ratio=0.5, sequence=16)
    sources = [
        packed(),
        packed((*TEXTS[:2], "x" * 200)),
        packed(sequence=64),
        packed(tokenizer=Letters()),
        packed(objective="masked"),
        packed(objective="masked", seed=1),
        PackedText.from_texts(TEXTS, config),
        PackedText.from_texts(TEXTS, config, split="validation"),
    ]
    assert len({source.fingerprint for source in sources}) == len(sources)
    assert packed().fingerprint == packed(seed=1).fingerprint  # causal samples draw nothing


@pytest.mark.parametrize("index", [-1, 10**6])
def test_a_sample_outside_the_data_is_an_index_error(index: int) -> None:
    with pytest.raises(IndexError, match=f"sample {index} of"):
        packed(sequence=8).sample(index)


@pytest.mark.parametrize(("objective", "needed", "largest"), [("causal", 65, 5), ("masked", 64, 6)])
def test_short_text_is_refused_with_the_sequence_that_fits(objective: str, needed: int, largest: int) -> None:
    with pytest.raises(
        DataError, match=f"has 6 tokens, but a sample of sequence 64 needs {needed}"
    ) as caught:
        packed(("short",), objective=objective, sequence=64)
    assert caught.value.hint == f"--seq {largest}"
    assert packed(("short",), objective=objective, sequence=largest).num_samples == 1


def test_no_text_at_all_is_refused() -> None:
    with pytest.raises(DataError, match="has 0 tokens"):
        packed(("", ""))


@pytest.mark.parametrize(("texts", "hint"), [(TEXTS, "validation_ratio = 0.5"), (("x" * 140,), "--seq 64")])
def test_an_empty_validation_split_is_refused(texts: tuple[str, ...], hint: str) -> None:
    with pytest.raises(DataError, match="leaves none for validation") as caught:
        PackedText.from_texts(texts, DataConfig(), split="validation")
    assert caught.value.hint == hint


def test_the_masked_objective_needs_a_mask_token() -> None:
    with pytest.raises(DataError, match="has no mask token") as caught:
        packed(tokenizer=Letters(), objective="masked")
    assert caught.value.hint == 'objective = "causal"'


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"objective": "prefix"}, "objective 'prefix' is not known"),
        ({"sequence": 0}, "a sequence of 0 tokens"),
        ({"seed": -1}, "seed -1 is negative"),
        ({"validation_ratio": 1.0}, "leaves nothing to train on"),
    ],
)
def test_a_wrong_setting_is_refused(setting: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        DataConfig(**setting)  # type: ignore[arg-type]
    assert caught.value.hint


def test_the_standard_library_is_text_enough() -> None:
    source = PackedText.from_config(DataConfig())
    assert source.num_tokens > 5_000_000
    assert source.sample(source.num_samples - 1)["labels"].shape == (128,)


class TestCache:
    @pytest.fixture
    def config(self, tmp_path: Path) -> DataConfig:
        (tmp_path / "text.txt").write_text("one text " * 100, encoding="utf-8")
        return DataConfig(paths=(str(tmp_path / "text.txt"),), sequence=16)

    def test_cached_tokens_are_the_same_samples(self, config: DataConfig, tmp_path: Path) -> None:
        cache = tmp_path / "cache"
        plain = PackedText.from_config(config)
        for _ in range(2):
            cached = PackedText.from_config(config, cache_dir=cache)
            assert cached.fingerprint == plain.fingerprint
            assert stream_of(cached) == stream_of(plain)
        assert [file.suffix for file in cache.iterdir()] == [".npy"]

    def test_changed_text_is_not_read_from_the_cache(self, config: DataConfig, tmp_path: Path) -> None:
        cache = tmp_path / "cache"
        PackedText.from_config(config, cache_dir=cache)
        (tmp_path / "text.txt").write_text("another text " * 100, encoding="utf-8")
        source = PackedText.from_config(config, cache_dir=cache)
        assert source.tokenizer.decode(source.sample(0)["input_ids"].tolist()) == "another text ano"

    def test_a_damaged_cache_is_named(self, config: DataConfig, tmp_path: Path) -> None:
        PackedText.from_config(config, cache_dir=tmp_path / "cache")
        (file,) = (tmp_path / "cache").iterdir()
        file.write_bytes(b"")
        with pytest.raises(DataError, match=r"token cache .* cannot be read") as caught:
            PackedText.from_config(config, cache_dir=tmp_path / "cache")
        assert caught.value.hint == f"rm -f {file}"

    def test_a_full_disk_leaves_no_half_written_cache(
        self, config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def save(file: BinaryIO, tokens: object, **options: object) -> None:
            file.write(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(np, "save", save)
        with pytest.raises(DataError, match="cannot be written: No space left on device"):
            PackedText.from_config(config, cache_dir=tmp_path / "cache")
        assert list((tmp_path / "cache").iterdir()) == []

    def test_a_cache_that_cannot_be_written_is_named(self, config: DataConfig, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="cannot be written: Not a directory") as caught:
            PackedText.from_config(config, cache_dir=tmp_path / "text.txt" / "cache")
        assert caught.value.hint == f"df -h {tmp_path / 'text.txt' / 'cache'}"


def test_a_sequence_to_sequence_sample_goes_on_where_its_input_ends() -> None:
    source = packed(objective="seq2seq", sequence=16)
    first, second = source.sample(0), source.sample(1)
    assert torch.equal(first["labels"], second["input_ids"])
    assert source.num_samples == source.num_tokens // 16 - 1
    with pytest.raises(DataError, match="needs 1000") as error:
        packed(objective="seq2seq", sequence=500)
    assert error.value.hint == f"--seq {source.num_tokens // 2}"
