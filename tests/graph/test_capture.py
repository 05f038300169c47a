"""The graph of a model computes what the model computes, bit for bit, and says where each value comes from."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from tests.graph.families import FAMILIES, source_of
from tests.graph.interpreter import run
from torch import Tensor, nn

from shardstage.graph import ModelGraph

GraphOf = Callable[[str], ModelGraph]
MICROBATCH, SEQUENCE = 2, 12


def loss_and_gradients(loss: Tensor, model: nn.Module) -> tuple[Tensor, dict[str, Tensor | None]]:
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_graph_trains_as_its_model_does_bit_for_bit(family: str, graph_of: GraphOf) -> None:
    source = source_of(family)
    torch.manual_seed(1)
    model = source.factory()
    twin = copy.deepcopy(model)
    batch = source.task.random_batch(MICROBATCH, SEQUENCE)
    graph = graph_of(family).at(microbatch=MICROBATCH, sequence=SEQUENCE)

    torch.manual_seed(7)  # of dropout
    loss, gradients = loss_and_gradients(source.task.loss(model.train(), batch), model)
    state = dict(twin.named_parameters()) | dict(twin.named_buffers())
    torch.manual_seed(7)
    graph_loss, graph_gradients = loss_and_gradients(run(graph, state, batch), twin)

    assert torch.equal(loss, graph_loss)
    for name, gradient in gradients.items():
        found = graph_gradients[name]
        assert (gradient is None and found is None) or torch.equal(gradient, found), name
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, twin.get_buffer(name)), name
