"""Models with positions of their own, as most are that somebody wrote: captured at any length that they take, refused at others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.graph.interpreter import run
from torch import Tensor, nn

from shardstage.errors import CaptureError, ConfigError, PlanError
from shardstage.graph import ModelGraph
from shardstage.graph.capture import capture
from shardstage.graph.positions import num_positions
from shardstage.graph.tasks import causal_task
from shardstage.plan import check, complete, parse_request

VOCABULARY = 40


class Positioned(nn.Module):
    """Words and their positions, of which there are ``number``; subclasses say how positions are had."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.words = nn.Embedding(VOCABULARY, 16)
        self.places = nn.Embedding(number, 16)
        self.hidden = nn.Linear(16, 16)
        self.head = nn.Linear(16, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        head: Tensor = self.head(self.hidden(self.words(ids) + self.placed(ids.shape[1])))
        return head

    def placed(self, length: int) -> Tensor:
        return self._at(torch.arange(length))

    def _at(self, index: Tensor) -> Tensor:
        found: Tensor = self.places(index)
        return found


class Asserting(Positioned):
    def placed(self, length: int) -> Tensor:
        assert length <= self.number, f"{length} tokens, and {self.number} positions"
        return super().placed(length)


class Sliced(Positioned):
    def placed(self, length: int) -> Tensor:
        return self.places.weight[None, :length]


class Whole(Positioned):
    def placed(self, length: int) -> Tensor:
        return self.places.weight


class Viewed(Positioned):
    def placed(self, length: int) -> Tensor:
        return self._at(torch.arange(0, length).unsqueeze(0))


class Shifted(Positioned):
    """Its numbers go to one more than the length."""

    def placed(self, length: int) -> Tensor:
        return self._at(torch.arange(1, length + 1))


def captured(kind: type[Positioned], number: int, sequence: int) -> ModelGraph:
    return capture(lambda: kind(number), sequence=sequence, task=causal_task(VOCABULARY))


def computes_as_the_model(graph: ModelGraph, model: nn.Module, sequence: int) -> bool:
    task = causal_task(VOCABULARY)
    batch = task.random_batch(2, sequence)
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    return torch.equal(task.loss(model, batch), run(graph.at(microbatch=2, sequence=sequence), state, batch))


@pytest.mark.parametrize("kind", [Positioned, Asserting, Sliced, Viewed])
@pytest.mark.parametrize(("number", "sequence"), [(64, 32), (64, 64), (20, 20), (256, 256)])
def test_a_model_is_captured_at_all_of_its_positions(
    kind: type[Positioned], number: int, sequence: int
) -> None:
    """It was tried at 97 tokens, or at a prime beyond what was asked for: "97 tokens, block size 64" was said to who had asked for 64."""
    graph = captured(kind, number, sequence)
    assert graph.is_scalable and graph.is_sequence_scalable
    for length in (sequence, sequence // 2):
        assert computes_as_the_model(graph, kind(number), length)


def test_a_model_that_takes_one_length_alone_is_captured_there() -> None:
    graph = captured(Whole, 64, 64)
    assert graph.is_scalable and not graph.is_sequence_scalable and graph.sequence == 64
    assert computes_as_the_model(graph, Whole(64), 64)


@pytest.mark.parametrize(("kind", "reason"), [(Asserting, "200 tokens, and 64 pos"), (Sliced, "length 64")])
def test_more_tokens_than_positions_are_refused_with_as_many_as_there_are(
    kind: type[Positioned], reason: str
) -> None:
    with pytest.raises(ConfigError, match="the model takes 50 tokens, and fails with 200") as caught:
        captured(kind, 64, 200)
    assert reason in caught.value.message and "test_positions.py" in caught.value.message
    assert caught.value.hint == "--seq 50"


def test_what_fails_at_any_length_is_said_as_before() -> None:
    class Broken(Positioned):
        def placed(self, length: int) -> Tensor:
            raise ValueError("no positions at all")

    with pytest.raises(CaptureError, match="ValueError: no positions at all") as caught:
        captured(Broken, 64, 32)
    assert "falls back to whole modules" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("kind", "found"), [(Positioned, 64), (Viewed, 64), (Asserting, 64), (Sliced, None), (Shifted, None)]
)
def test_positions_are_the_rows_of_a_table_that_is_looked_up_by_counting(
    kind: type[Positioned], found: int | None
) -> None:
    assert num_positions(captured(kind, 64, 48)) == found


def test_a_plan_for_more_tokens_than_a_table_has_rows_is_refused() -> None:
    """Tracing sees no number: the model was captured and priced, and its first step would have failed."""
    graph = captured(Positioned, 64, 128)

    def checked(sequence: int, **more: Any) -> tuple[str, ...]:
        plan = complete(
            parse_request("dp=2"),
            graph,
            num_ranks=2,
            global_batch=4,
            sequence=sequence,
            precision="float32",
        )
        return check(plan, graph, num_ranks=2, **more)

    checked(64)
    for said in (None, 1024):
        with pytest.raises(PlanError, match="128 tokens are longer than the 64 positions") as caught:
            checked(128, max_sequence=said)
        assert caught.value.hint == "--seq 64"
