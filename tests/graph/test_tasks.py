"""A task's loss is the sum over its targets, in at least float32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.graph.families import source_of
from torch import Tensor, nn

from shardstage.errors import ConfigError
from shardstage.graph.tasks import InputSpec, batch_task, causal_task, image_task, seq2seq_task


class Table(nn.Module):
    """Logits by token."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.rows = nn.Embedding(7, 7, dtype=dtype)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.rows(input_ids)


def test_the_loss_is_summed_over_targets_and_ignores_the_others() -> None:
    model = Table(torch.float32)
    batch = {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([[2, -100, 4]])}
    logits = model(batch["input_ids"])[0]
    expected = F.cross_entropy(logits[:1], torch.tensor([2])) + F.cross_entropy(logits[2:], torch.tensor([4]))
    assert torch.allclose(causal_task(7).loss(model, batch), expected)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_narrow_logits_are_widened_and_wide_ones_kept(dtype: torch.dtype, expected: torch.dtype) -> None:
    task = causal_task(7)
    assert task.loss(Table(dtype), task.random_batch(2, 3)).dtype == expected


def test_a_sequence_to_sequence_decoder_reads_the_labels_shifted_right() -> None:
    seen: dict[str, Tensor] = {}

    class Decoder(nn.Module):
        def forward(self, input_ids: Tensor, decoder_input_ids: Tensor, use_cache: bool) -> tuple[Tensor]:
            seen["decoder"] = decoder_input_ids
            return (F.one_hot(decoder_input_ids, 9).float(),)

    batch = {"input_ids": torch.zeros(1, 3, dtype=torch.int64), "labels": torch.tensor([[5, -100, 6]])}
    seq2seq_task(9, start_id=1, pad_id=2).loss(Decoder(), batch)
    assert seen["decoder"].tolist() == [[1, 5, 2]]


def test_t5_is_shifted_as_transformers_does() -> None:
    source = source_of("t5-tiny")
    model = source.factory().eval()
    batch = source.task.random_batch(2, 5)
    batch["labels"][0, 2] = -100
    mean = model(**batch, use_cache=False).loss
    assert torch.allclose(source.task.loss(model, batch) / 9, mean)


def test_an_example_batch_has_the_sizes_asked_for() -> None:
    images = image_task(image_size=(4, 5), num_channels=3, num_classes=10)
    assert {n: t.shape for n, t in images.example_batch(2).items()} == {
        "pixel_values": (2, 3, 4, 5),
        "labels": (2,),
    }
    assert not images.has_sequence
    tokens = causal_task(7).example_batch(2, 6)["input_ids"]
    assert (tokens.shape, tokens.dtype, tokens.is_meta) == ((2, 6), torch.int64, True)


def test_a_random_batch_is_drawn_from_its_seed() -> None:
    task = causal_task(7)
    one, same, other = (task.random_batch(4, 8, seed=seed)["labels"] for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert one.max() < 7


def test_a_task_of_the_user_s_own_is_shaped_by_its_example() -> None:
    batch = {"input_ids": torch.zeros(2, 6, dtype=torch.int64), "bias": torch.zeros(2, 3, 6, 6)}
    task = batch_task(lambda model, batch: model(batch["input_ids"]).sum(), batch)
    assert task.inputs["bias"] == InputSpec(shape=("microbatch", 3, "sequence", "sequence"), dtype="float32")
    assert task.example_batch(5, 9)["bias"].shape == (5, 3, 9, 9)


def test_a_sequence_without_a_length_is_refused() -> None:
    with pytest.raises(ConfigError, match="reads sequences, and no length is given") as caught:
        causal_task(7).example_batch(2)
    assert caught.value.hint == "sequence = 512"
