"""Which data set a run trains on: text where the model reads it, the user's own, or random tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shardstage.data import DataConfig, PackedText, RandomSamples
from shardstage.errors import ConfigError, DataError
from shardstage.graph.source import load_model
from shardstage.training.samples import samples_of

DATASET = """
import torch
dataset = [{"pixel_values": torch.zeros(3, 32, 32), "labels": torch.tensor(i)} for i in range(5)]
def make():
    return dataset[:2]
number = 7
"""


def test_a_model_of_text_reads_text() -> None:
    assert isinstance(samples_of(DataConfig(), load_model("llama-tiny")), PackedText)


def test_random_samples_have_the_shapes_that_the_model_reads() -> None:
    samples = samples_of(DataConfig(samples="random", sequence=9), load_model("t5-tiny"))
    assert isinstance(samples, RandomSamples)
    assert {name: tuple(t.shape) for name, t in samples.sample(0).items()} == {
        "input_ids": (9,),
        "labels": (9,),
    }


@pytest.mark.parametrize(("name", "num_samples"), [("dataset", 5), ("make", 2)])
def test_a_data_set_of_the_users_own_is_imported(tmp_path: Path, name: str, num_samples: int) -> None:
    path = tmp_path / "my_data.py"
    path.write_text(DATASET)
    samples = samples_of(DataConfig(samples=f"{path}:{name}"), load_model("vit-tiny"))
    assert samples.num_samples == num_samples
    assert torch.equal(samples.sample(1)["labels"], torch.tensor(1))


def test_a_model_of_images_needs_a_data_set() -> None:
    with pytest.raises(ConfigError, match="trained on images data, and the run names none") as error:
        samples_of(DataConfig(), load_model("vit-tiny"))
    assert error.value.hint is not None and "samples =" in error.value.hint


def test_what_is_no_data_set_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "my_data.py"
    path.write_text(DATASET)
    with pytest.raises(DataError, match="is a int, which has no length"):
        samples_of(DataConfig(samples=f"{path}:number"), load_model("vit-tiny"))
    with pytest.raises(ConfigError, match=r"the data set .* cannot be imported"):
        samples_of(DataConfig(samples="no_such_module:dataset"), load_model("vit-tiny"))
