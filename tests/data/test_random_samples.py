"""Random samples depend on their number alone, and have the shapes and ranges asked for."""

from __future__ import annotations

import pytest
import torch

from shardstage.data import RandomSamples, TensorSpec, as_source

SPECS = {
    "pixel_values": TensorSpec((3, 8, 8), "float32", 2),
    "labels": TensorSpec((), "int64", 10),
}


def test_a_sample_is_always_the_same() -> None:
    first, again = RandomSamples(SPECS, seed=3), RandomSamples(SPECS, seed=3)
    for name in SPECS:
        assert torch.equal(first.sample(5)[name], again.sample(5)[name])
    assert first.fingerprint == again.fingerprint
    assert as_source(first) is first


def test_samples_and_seeds_differ() -> None:
    samples = RandomSamples(SPECS, seed=3)
    assert not torch.equal(samples.sample(0)["pixel_values"], samples.sample(1)["pixel_values"])
    other = RandomSamples(SPECS, seed=4)
    assert not torch.equal(samples.sample(0)["pixel_values"], other.sample(0)["pixel_values"])
    assert samples.fingerprint != other.fingerprint


def test_tensors_have_the_shape_the_dtype_and_the_range_asked_for() -> None:
    samples = RandomSamples({**SPECS, "ids": TensorSpec((50,), "int64", 7)}, seed=0)
    sample = samples.sample(11)
    assert sample["labels"].shape == () and sample["labels"].dtype == torch.int64
    assert set(sample["ids"].tolist()) == set(range(7))
    assert sample["pixel_values"].dtype == torch.float32


def test_floats_are_normal() -> None:
    numbers = RandomSamples({"x": TensorSpec((10_000,), "float64", 2)}, seed=0).sample(0)["x"]
    assert abs(float(numbers.mean())) < 0.05  # standard error 0.01
    assert abs(float(numbers.std()) - 1) < 0.05


def test_there_is_no_sample_beyond_the_last() -> None:
    samples = RandomSamples(SPECS, seed=0)
    with pytest.raises(IndexError, match="of 65536"):
        samples.sample(samples.num_samples)
