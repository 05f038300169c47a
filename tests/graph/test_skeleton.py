"""A skeleton has the model's shapes, ties and buffers, and no weights."""

from __future__ import annotations

import pytest
import torch
import transformers
from tests.graph.families import FAMILIES, LSTM, source_of
from torch import Tensor, nn

from shardstage.compat import FakeTensor, FakeTensorMode
from shardstage.graph.skeleton import build_skeleton, fake_parameters


class Wide(nn.Module):
    """Parameters and tables of every origin."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1024, 1024)
        self.random = nn.Parameter(torch.randn(2048, 1024))
        self.zeros = nn.Parameter(torch.zeros((2048, 1024)))
        self.full = nn.Parameter(torch.full((2048, 1024), 0.5))
        self.tied = self.random
        self.register_buffer("positions", torch.arange(4096))
        self.register_buffer("mask", torch.ones(64, 64).tril())


class LargeTable(nn.Module):
    """A buffer that begins as a large empty tensor."""

    def __init__(self) -> None:
        super().__init__()
        table = torch.empty(512, 256)
        table[:] = torch.arange(256)
        self.register_buffer("table", table)


class LargeMask(nn.Module):
    """A buffer of more elements than many a layer, beside a layer that is larger still."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2048, 1024)
        self.register_buffer("mask", torch.ones(1024, 1024).tril())

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_skeleton_has_the_model_s_shapes_and_buffers(family: str) -> None:
    factory = source_of(family).factory
    model, skeleton = factory(), build_skeleton(factory)
    shapes = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
    assert {name: p.shape for name, p in skeleton.named_parameters(remove_duplicate=False)} == shapes
    assert [*dict(skeleton.named_parameters())] == [*dict(model.named_parameters())]  # the same ties
    for name, buffer in model.named_buffers():
        assert torch.equal(skeleton.get_buffer(name), buffer), name


def test_large_parameters_of_every_origin_are_without_memory() -> None:
    skeleton = build_skeleton(Wide)
    assert all(getattr(skeleton, name).is_meta for name in ("random", "zeros", "full"))
    assert skeleton.linear.weight.is_meta
    assert skeleton.tied is skeleton.random
    assert skeleton.positions.tolist() == [*range(4096)]


def test_a_large_buffer_is_made_for_real() -> None:
    assert build_skeleton(LargeTable).table[511].tolist() == [*range(256)]
    skeleton = build_skeleton(LargeMask)
    assert skeleton.mask.sum() == 1024 * 1025 / 2
    assert skeleton.linear.weight.is_meta


def test_seventy_billion_parameters_are_built_of_nothing() -> None:
    config = transformers.LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    skeleton = build_skeleton(lambda: transformers.LlamaForCausalLM(config))
    assert sum(p.numel() for p in skeleton.parameters()) == 70_553_706_496
    assert not skeleton.model.rotary_emb.inv_freq.is_meta
    assert sum(p.numel() for p in skeleton.parameters() if not p.is_meta) < 2e6  # norms


def test_building_a_skeleton_draws_no_random_numbers() -> None:
    state = torch.get_rng_state()
    build_skeleton(LSTM)
    assert torch.equal(torch.get_rng_state(), state)


def test_parameters_are_fake_for_a_while_and_then_the_same_objects() -> None:
    model = Wide()
    before = dict(model.named_parameters(remove_duplicate=False))
    with fake_parameters(model, FakeTensorMode(), torch.bfloat16):
        assert isinstance(model.linear.weight, FakeTensor) or isinstance(model.linear.weight.data, FakeTensor)
        assert model.linear.weight.dtype == torch.bfloat16
        assert model.linear.weight.device.type == "cpu"
        assert model.tied is model.random
        assert model.positions.dtype == torch.int64
    assert all(dict(model.named_parameters(remove_duplicate=False))[n] is p for n, p in before.items())


def test_parameters_come_back_after_an_error() -> None:
    model = nn.LSTM(4, 4)
    weight = model.weight_ih_l0
    with pytest.raises(ZeroDivisionError), fake_parameters(model, FakeTensorMode()):
        raise ZeroDivisionError
    assert model.weight_ih_l0 is weight
    assert model(torch.zeros(2, 1, 4))[0].shape == (2, 1, 4)  # the LSTM's own list of weights is back too


def test_frozen_parameters_stay_frozen() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    with fake_parameters(model, FakeTensorMode()):
        assert (model.weight.requires_grad, model.bias.requires_grad) == (True, False)


def test_running_statistics_follow_into_float64_only() -> None:
    model = nn.BatchNorm1d(3)
    with fake_parameters(model, FakeTensorMode(), torch.float64):
        assert model.running_mean.dtype == torch.float64
    with fake_parameters(model, FakeTensorMode(), torch.bfloat16):
        assert model.running_mean.dtype == torch.float32
    assert model.running_mean.dtype == torch.float32
