"""The global order: by step alone, once per epoch; shares that tile the batch."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardstage.data import BatchSampler, shares
from shardstage.errors import DataError

sizes = st.integers(1, 60).flatmap(lambda num: st.tuples(st.just(num), st.integers(1, num)))
seeds = st.integers(0, 2**40)
GOLDEN = ((6, 3, 4, 9, 0, 2, 8, 7, 5, 1), (1, 3, 2, 7, 8, 4, 5, 9, 0, 6))


def order(sampler: BatchSampler, num_steps: int) -> list[int]:
    return [sample_id for step in range(num_steps) for sample_id in sampler.sample_ids(step)]


@settings(max_examples=50, deadline=None)
@given(sizes, seeds, st.booleans())
def test_every_sample_is_used_once_per_epoch(size: tuple[int, int], seed: int, shuffle: bool) -> None:
    num_samples, global_batch = size
    sampler = BatchSampler(num_samples=num_samples, global_batch=global_batch, seed=seed, shuffle=shuffle)
    num_epochs = global_batch  # ends exactly after num_samples steps
    ids = order(sampler, num_samples)
    for epoch in range(num_epochs):
        assert sorted(ids[epoch * num_samples : (epoch + 1) * num_samples]) == list(range(num_samples))


@settings(max_examples=50, deadline=None)
@given(sizes, seeds, st.lists(st.integers(0, 200), min_size=1))
def test_any_step_can_be_asked_for_in_any_order(size: tuple[int, int], seed: int, steps: list[int]) -> None:
    num_samples, global_batch = size
    used = BatchSampler(num_samples=num_samples, global_batch=global_batch, seed=seed)
    for step in steps:
        fresh = BatchSampler(num_samples=num_samples, global_batch=global_batch, seed=seed)
        assert used.sample_ids(step) == fresh.sample_ids(step)


@settings(max_examples=50, deadline=None)
@given(sizes, seeds)
def test_the_order_does_not_depend_on_the_size_of_the_batch(size: tuple[int, int], seed: int) -> None:
    num_samples, global_batch = size
    whole = BatchSampler(num_samples=num_samples, global_batch=global_batch, seed=seed)
    single = BatchSampler(num_samples=num_samples, global_batch=1, seed=seed)
    assert order(whole, 3) == order(single, 3 * global_batch)


def test_the_order_is_the_same_on_every_machine_and_version() -> None:
    sampler = BatchSampler(num_samples=10, global_batch=10, seed=7)
    assert sampler.sample_ids(0) == GOLDEN[0]
    assert sampler.sample_ids(1) == GOLDEN[1]


def test_another_seed_is_another_order() -> None:
    first, second = (BatchSampler(num_samples=100, global_batch=100, seed=seed) for seed in (0, 1))
    assert first.sample_ids(0) != second.sample_ids(0)
    assert first.sample_ids(0) != first.sample_ids(1)


def test_without_shuffling_samples_come_in_their_order() -> None:
    sampler = BatchSampler(num_samples=5, global_batch=3, seed=0, shuffle=False)
    assert [sampler.sample_ids(step) for step in range(3)] == [(0, 1, 2), (3, 4, 0), (1, 2, 3)]
    assert sampler.epoch(5) == 3.0


def test_too_few_samples_are_refused_with_the_batch_that_fits() -> None:
    with pytest.raises(DataError, match="has 3 samples, but a global batch needs 8") as caught:
        BatchSampler(num_samples=3, global_batch=8, seed=0)
    assert caught.value.hint == "--batch 3"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"global_batch": 0}, "a global batch of 0 samples is empty"),
        ({"seed": -2}, "seed -2 is negative"),
        ({"num_samples": 0}, "has 0 samples"),
    ],
)
def test_a_wrong_setting_is_refused(setting: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        BatchSampler(**({"num_samples": 4, "global_batch": 2, "seed": 0} | setting))
    assert caught.value.hint


def test_a_step_before_the_first_is_an_index_error() -> None:
    with pytest.raises(IndexError, match="step -1 is negative"):
        BatchSampler(num_samples=4, global_batch=2, seed=0).sample_ids(-1)


weights = st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=9).filter(any)


@settings(max_examples=50, deadline=None)
@given(weights, st.integers(0, 500))
def test_shares_tile_the_batch_and_feed_everyone_with_a_weight(
    given_weights: list[float], extra: int
) -> None:
    global_batch = sum(weight > 0 for weight in given_weights) + extra
    parts = shares(global_batch, given_weights)
    assert [position for part in parts for position in part] == list(range(global_batch))
    assert [len(part) > 0 for part in parts] == [weight > 0 for weight in given_weights]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=9), st.integers(1, 20))
def test_weights_that_divide_the_batch_are_met_exactly(given_weights: list[int], factor: int) -> None:
    parts = shares(factor * sum(given_weights), given_weights)
    assert [len(part) for part in parts] == [factor * weight for weight in given_weights]


def test_equal_shares_differ_by_one_sample_at_most_and_the_first_are_larger() -> None:
    assert shares(8, 3) == (range(3), range(3, 6), range(6, 8))
    assert shares(6, 3) == (range(2), range(2, 4), range(4, 6))


def test_a_small_weight_still_gets_a_sample() -> None:
    assert [len(part) for part in shares(8, (100.0, 100.0, 0.001, 0.0))] == [3, 4, 1, 0]


@pytest.mark.parametrize("wrong", [(), (0.0, 0.0), (1.0, -1.0), (1.0, float("nan")), 0, (float("inf"), 1.0)])
def test_what_are_no_weights_is_refused(wrong: int | tuple[float, ...]) -> None:
    with pytest.raises(DataError, match="are no weights of a batch"):
        shares(4, wrong)


def test_a_batch_smaller_than_its_ranks_is_refused() -> None:
    with pytest.raises(DataError, match="a batch of 2 samples cannot be shared by 3") as caught:
        shares(2, 3)
    assert caught.value.hint == "--batch 3"
