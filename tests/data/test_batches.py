"""A rank's batches: the same global batch however it is shared, resumable at any step."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardstage.data import (
    BatchSampler,
    DataConfig,
    IndexedSource,
    Microbatch,
    PackedText,
    RankBatches,
    as_source,
    shares,
)
from shardstage.errors import DataError

TEXT = "".join(f"line {number} of a text\n" for number in range(60))


def text_source(**config: object) -> PackedText:
    return PackedText.from_texts([TEXT], DataConfig(sequence=16, **config))  # type: ignore[arg-type]


def sampler_of(source: PackedText, *, global_batch: int = 6, seed: int = 0) -> BatchSampler:
    return BatchSampler(num_samples=source.num_samples, global_batch=global_batch, seed=seed)


def rank_batches(source: PackedText, *, seed: int = 0, global_batch: int = 6, **options: bool) -> RankBatches:
    sampler = sampler_of(source, global_batch=global_batch, seed=seed)
    return RankBatches(source, sampler, share=range(2, 5), microbatches=2, **options)


def rows(microbatches: tuple[Microbatch, ...]) -> list[tuple[int, int, list[int]]]:
    """(position, sample id, tokens) of every sample, in order."""
    return [
        (position, sample_id, ids.tolist())
        for microbatch in microbatches
        for position, sample_id, ids in zip(
            microbatch.positions, microbatch.sample_ids, microbatch.tensors["input_ids"], strict=True
        )
    ]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(0.1, 10), min_size=1, max_size=5),
    st.integers(0, 20),
    st.integers(1, 3),
    st.integers(0, 40),
)
def test_the_global_batch_is_the_same_for_every_split(
    weights: list[float], extra: int, num_microbatches: int, step: int
) -> None:
    source = text_source()
    sampler = sampler_of(source, global_batch=len(weights) + extra)
    (whole,) = RankBatches(source, sampler, share=range(sampler.global_batch), microbatches=1).step(step)
    split = [
        row
        for share in shares(sampler.global_batch, weights)
        for row in rows(
            RankBatches(source, sampler, share=share, microbatches=min(num_microbatches, len(share))).step(
                step
            )
        )
    ]
    assert split == rows((whole,))
    assert whole.sample_ids == sampler.sample_ids(step)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 30), st.integers(1, 5), st.booleans())
def test_a_run_restarted_at_any_step_sees_the_same_batches(stop: int, more: int, prefetch: bool) -> None:
    source = text_source(objective="masked")
    uninterrupted = rank_batches(source)
    expected = [rows(uninterrupted.step(step)) for step in range(stop + more)]
    first = rank_batches(source)
    for step in range(stop):
        first.step(step)
    second = rank_batches(text_source(objective="masked"), prefetch=prefetch)
    second.load_state_dict(first.state_dict())
    assert second.next_step == stop
    assert [rows(second.step(second.next_step)) for _ in range(more)] == expected[stop:]
    second.close()


def test_microbatches_are_stacked_samples() -> None:
    source = text_source()
    batches = RankBatches(source, sampler_of(source), share=range(1, 6), microbatches=(1, 3, 1))
    microbatches = batches.step(4)
    assert [microbatch.positions for microbatch in microbatches] == [(1,), (2, 3, 4), (5,)]
    middle = microbatches[1]
    assert middle.tensors["input_ids"].shape == middle.tensors["labels"].shape == (3, 16)
    assert torch.equal(middle.tensors["labels"][2], source.sample(middle.sample_ids[2])["labels"])
    assert middle.num_targets == 3 * 16


def test_targets_are_the_labels_that_count() -> None:
    source = text_source(objective="masked")
    (microbatch,) = RankBatches(source, sampler_of(source), share=range(4), microbatches=1).step(0)
    assert microbatch.num_targets == 4 * round(0.15 * 16)


def test_samples_without_labels_count_as_one_target_each() -> None:
    samples = [{"pixels": torch.zeros(3, 2)} for _ in range(4)]
    sampler = BatchSampler(num_samples=4, global_batch=4, seed=0)
    (microbatch,) = RankBatches(samples, sampler, share=range(4), microbatches=1).step(0)
    assert microbatch.num_targets == 4
    assert microbatch.tensors["pixels"].shape == (4, 3, 2)


def test_reading_ahead_reads_the_next_step_and_survives_a_jump() -> None:
    source = text_source()
    plain, ahead = rank_batches(source), rank_batches(source, prefetch=True)
    for step in (0, 1, 2, 9, 10, 3):
        assert rows(ahead.step(step)) == rows(plain.step(step))
    ahead.close()
    assert not any(thread.name.startswith("shardstage-data") for thread in threading.enumerate())


def test_an_error_while_reading_ahead_reaches_the_step_it_belongs_to() -> None:
    samples = [{"x": [0]}, {"x": [0]}, {"x": [0]}, {"x": [0, 1]}]
    sampler = BatchSampler(num_samples=4, global_batch=2, seed=0, shuffle=False)
    batches = RankBatches(samples, sampler, share=range(2), microbatches=1, prefetch=True)
    batches.step(0)
    with pytest.raises(DataError, match=r"samples \(2, 3\) do not stack"):
        batches.step(1)
    assert batches.next_step == 1
    batches.close()


@pytest.mark.parametrize(
    ("other", "message", "hint"),
    [
        ({"objective": "masked"}, "saved with other data", "--resume with"),
        ({"seed": 5}, "saved with another seed: seed 0, here 5", "seed = 0"),
        ({"global_batch": 8}, "another global batch: global_batch 6, here 8", "--batch 6"),
    ],
)
def test_a_position_in_other_data_is_refused(other: dict[str, object], message: str, hint: str) -> None:
    state = rank_batches(text_source()).state_dict()
    objective = {"objective": other.pop("objective")} if "objective" in other else {}
    batches = rank_batches(text_source(**objective), **other)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=message) as caught:
        batches.load_state_dict(state)
    assert caught.value.hint is not None and caught.value.hint.startswith(hint)
    assert batches.next_step == 0


def test_an_unshuffled_position_is_not_a_shuffled_one() -> None:
    source = text_source()
    state = rank_batches(source).state_dict() | {"shuffle": False}
    with pytest.raises(DataError, match="another order") as caught:
        rank_batches(source).load_state_dict(state)
    assert caught.value.hint == "shuffle = false"


@pytest.mark.parametrize("microbatches", [0, 4, (), (1, 1), (3, 0), (4, -1)])
def test_microbatches_that_do_not_make_the_share_are_refused(microbatches: int | tuple[int, ...]) -> None:
    source = text_source()
    with pytest.raises(DataError, match="microbatches") as caught:
        RankBatches(source, sampler_of(source), share=range(3), microbatches=microbatches)
    assert caught.value.hint is not None and caught.value.hint.startswith("microbatches = ")


def test_a_share_beyond_the_batch_is_refused() -> None:
    source = text_source()
    with pytest.raises(DataError, match=r"positions 4\.\.8 leave a global batch of 6"):
        RankBatches(source, sampler_of(source), share=range(4, 9), microbatches=1)


def test_a_sampler_of_other_data_is_refused() -> None:
    sampler = BatchSampler(num_samples=7, global_batch=2, seed=0)
    with pytest.raises(DataError, match="the sampler orders 7 samples, the data has"):
        RankBatches(text_source(), sampler, share=range(2), microbatches=1)


class TestIndexedSource:
    def test_a_users_own_samples_become_tensors(self) -> None:
        source = as_source([{"x": [1.0, 2.0], "labels": 1}, {"x": [3.0, 4.0], "labels": -100}])
        assert source.num_samples == 2
        assert source.sample(1)["x"].tolist() == [3.0, 4.0]
        assert source.sample(1)["labels"].shape == ()

    def test_a_source_stays_itself(self) -> None:
        source = text_source()
        assert as_source(source) is source

    def test_the_fingerprint_notices_other_samples(self) -> None:
        first = IndexedSource([{"x": torch.tensor([1.0], dtype=torch.bfloat16)}])
        same = IndexedSource([{"x": torch.tensor([1.0], dtype=torch.bfloat16)}])
        other = IndexedSource([{"x": torch.tensor([2.0], dtype=torch.bfloat16)}])
        assert first.fingerprint == same.fingerprint != other.fingerprint
        assert IndexedSource([{"x": 1}], fingerprint="mine").fingerprint == "mine"

    def test_an_empty_data_set_is_refused(self) -> None:
        with pytest.raises(DataError, match="the data set is empty"):
            IndexedSource([])

    def test_a_sample_that_is_no_dict_is_refused(self) -> None:
        with pytest.raises(DataError, match="sample 0 is a tuple, not a dict of tensors"):
            IndexedSource([(1, 2)])  # type: ignore[list-item]

    def test_a_sample_outside_the_data_is_an_index_error(self) -> None:
        with pytest.raises(IndexError, match="sample 1 of 1"):
            IndexedSource([{"x": 1}]).sample(1)

    def test_samples_of_two_shapes_are_named(self) -> None:
        samples = [{"x": [1]}, {"x": [1, 2]}]
        sampler = BatchSampler(num_samples=2, global_batch=2, seed=0, shuffle=False)
        with pytest.raises(DataError, match=r"samples \(0, 1\) do not stack"):
            RankBatches(samples, sampler, share=range(2), microbatches=1).step(0)
