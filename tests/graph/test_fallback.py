"""A model that cannot be exported becomes whole modules, which train as it does."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.graph.awkward import Plain, awkward
from tests.graph.interpreter import run
from torch import nn

from shardstage.errors import CaptureError
from shardstage.graph import ModelGraph
from shardstage.graph.capture import capture
from shardstage.graph.fallback import capture_blocks, capture_or_blocks, module_library
from shardstage.graph.file import graph_from_json, graph_to_json
from shardstage.graph.source import ModelSource
from shardstage.graph.tasks import causal_task

NAMES = ("stack", "sequential", "tangle")


def targets(graph: ModelGraph) -> list[str]:
    return [op.target.removeprefix("shardstage.") for op in graph.ops]


def test_the_line_that_prevents_capture_is_named() -> None:
    with pytest.raises(CaptureError, match=r"at .*awkward\.py:\d+: if x\.abs\(\)\.sum\(\) > 0\.1:"):
        capture(awkward("stack"))
    (note, _) = capture_or_blocks(awkward("stack")).notes
    assert "awkward.py:" in note
    assert note.endswith("if x.abs().sum() > 0.1:: data-dependent control flow")


def test_a_failed_capture_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    capture_or_blocks(awkward("tangle"))
    assert capfd.readouterr() == ("", "")


def test_shapes_that_do_not_fit_are_said_by_the_error_alone(capfd: pytest.CaptureFixture[str]) -> None:
    def factory() -> nn.Module:
        return nn.Sequential(nn.Embedding(40, 8), nn.Linear(9, 40))

    source = ModelSource(name="narrow", factory=factory, task=causal_task(40))
    with pytest.raises(CaptureError, match="must have same reduction dim"):
        capture(source)
    assert capfd.readouterr() == ("", ""), "torch logs a traceback of its own"


@pytest.mark.parametrize("name", NAMES)
def test_blocks_train_as_their_model_does_bit_for_bit(name: str) -> None:
    source = awkward(name)
    torch.manual_seed(1)
    model = source.factory().train()
    twin = copy.deepcopy(model)
    batch = source.task.random_batch(2, 6)
    graph = capture_or_blocks(source).at(microbatch=2, sequence=6)

    loss = source.task.loss(model, batch)
    loss.backward()
    state = dict(twin.named_parameters()) | dict(twin.named_buffers())
    found = run(graph, state, batch, library=module_library(source))
    found.backward()

    assert torch.equal(loss, found)
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad)
    for buffer, other in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(buffer, other)


def test_blocks_in_a_row_become_a_chain() -> None:
    assert targets(capture_or_blocks(awkward("stack"))) == ["before", "module", "module", "module", "after"]
    assert targets(capture_or_blocks(awkward("sequential"))) == [
        "before",
        "module",
        "module",
        "module",
        "after",
    ]


def test_blocks_that_read_each_other_stay_one_op() -> None:
    assert targets(capture_or_blocks(awkward("tangle"))) == ["loss"]


def test_a_chain_has_the_shapes_of_its_size() -> None:
    graph = capture_or_blocks(awkward("stack"))
    assert graph.is_scalable and graph.is_sequence_scalable
    scaled = graph.at(microbatch=5, sequence=9)
    assert scaled.values["hidden2"].shape == (5, 9, 8)
    assert scaled.values["hidden2"].requires_grad
    exact = capture_blocks(awkward("stack"), microbatch=5, sequence=9)
    assert exact.values == scaled.values
    assert exact.ops == scaled.ops


def test_every_parameter_is_listed_once_with_its_ties() -> None:
    graph = capture_or_blocks(awkward("stack"))
    ties = {parameter.fqn: parameter.ties for parameter in graph.parameters}
    assert ties["embed.weight"] == ("head.weight",)
    assert "head.weight" not in ties
    assert graph.num_parameters == sum(p.numel() for p in awkward("stack").factory().parameters())


def test_a_chain_survives_its_file() -> None:
    graph = capture_or_blocks(awkward("stack"))
    assert graph_from_json(graph_to_json(graph)) == graph


def test_what_can_be_captured_does_not_fall_back() -> None:
    source = ModelSource(name="plain", factory=Plain, task=causal_task(20))
    graph = capture_or_blocks(source)
    assert graph.notes == ()
    assert "aten.embedding.default" in {op.target for op in graph.ops}


def test_a_model_that_does_not_run_is_refused() -> None:
    with pytest.raises(CaptureError, match="fails on a batch of 2 samples: no model at all"):
        capture_or_blocks(awkward("broken"))
