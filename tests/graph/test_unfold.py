"""A deep model captured with few of its layers: the same graph as that of a capture of all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from shardstage.errors import CaptureError
from shardstage.graph import ModelGraph
from shardstage.graph.capture import capture, capture_short
from shardstage.graph.capture_depth import find_repeats, shallow
from shardstage.graph.source import ModelSource
from shardstage.graph.tasks import causal_task
from shardstage.graph.unfold import Repeat, ShortGraph

_VOCABULARY = 50
_DEEP = 10
_SMALL = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": _VOCABULARY}
_TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_layer=_DEEP, n_embd=32, n_head=4, vocab_size=_VOCABULARY, **_TOKENS)
    return transformers.GPT2LMHeadModel(config)


def deepseek() -> nn.Module:
    config = transformers.DeepseekV3Config(
        **_SMALL,
        **_TOKENS,
        num_key_value_heads=4,
        num_hidden_layers=_DEEP + 1,
        first_k_dense_replace=2,
        n_routed_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        n_group=2,
        topk_group=1,
        q_lora_rank=8,
        kv_lora_rank=8,
    )
    return transformers.DeepseekV3ForCausalLM(config)


class Block(nn.Module):
    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.up, self.down, self.scale = nn.Linear(8, 16), nn.Linear(16, 8), scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.down(F.gelu(self.up(x)))


class Alternating(nn.Module):
    """Two kinds of layers take turns, and the last is a third kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(_VOCABULARY, 8)
        self.layers = nn.ModuleList(Block(2.0 if i == 14 else 1.0 - 0.5 * (i % 2)) for i in range(15))
        self.head = nn.Linear(8, _VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Two(nn.Module):
    """Two lists of layers; every layer of the second also reads what the first has made."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(_VOCABULARY, 8)
        self.encoder = nn.ModuleList(Block() for _ in range(11))
        self.decoder = nn.ModuleList(Block() for _ in range(12))
        self.head = nn.Linear(8, _VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.encoder:
            x = layer(x)
        y = torch.ones_like(x)
        for layer in self.decoder:
            y = layer(y) * x
        return self.head(y)


class Collecting(Alternating):
    """The head reads what every layer has made."""

    def forward(self, input_ids: Tensor) -> Tensor:
        states = [self.embed(input_ids)]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return self.head(torch.stack(states).sum(0))


class Dense(Alternating):
    """Every second layer besides reads the state three layers before."""

    def forward(self, input_ids: Tensor) -> Tensor:
        states = [self.embed(input_ids)] * 4
        for layer in self.layers:
            states.append(layer(states[-1]) + states[-4])
        return self.head(states[-1])


class Numbered(Alternating):
    """A layer's number decides what it computes, though its module does not show it."""

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for number, layer in enumerate(self.layers):
            x = layer(x) / (number + 1)
        return self.head(x)


def whole(monkeypatch: pytest.MonkeyPatch, source: ModelSource) -> ModelGraph:
    with monkeypatch.context() as patch:
        patch.setattr("shardstage.graph.capture.find_repeats", lambda _model: ())
        return capture(source, microbatch=3, sequence=20)


def source_of(factory: Callable[[], nn.Module]) -> ModelSource:
    return ModelSource(name=factory.__name__, factory=factory, task=causal_task(_VOCABULARY))


@pytest.mark.parametrize("factory", [gpt2, deepseek, Alternating, Two])
def test_a_short_capture_unfolds_to_the_graph_of_the_whole_model(
    factory: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    short = capture_short(source_of(factory), microbatch=3, sequence=20)
    assert short.repeats
    graph = whole(monkeypatch, source_of(factory))
    assert len(short.graph.ops) < len(graph.ops)
    assert short.unfold() == graph


def test_the_values_of_an_unfolded_graph_lie_in_the_order_of_its_ops() -> None:
    """Those after the layers lay in the order of a set: two captures of one model were two different texts."""
    graph = capture_short(Alternating, task=causal_task(_VOCABULARY), sequence=16).unfold()
    made = [graph.producer[name] for name, value in graph.values.items() if value.kind == "activation"]
    assert len(made) > 20
    assert made == sorted(made)


@pytest.mark.parametrize("factory", [Collecting, Dense, Numbered])
def test_a_model_whose_layers_reach_further_is_captured_whole(
    factory: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_repeats(factory())
    short = capture_short(source_of(factory), microbatch=3, sequence=20)
    assert short.repeats == ()
    assert short.graph == whole(monkeypatch, source_of(factory))


@pytest.mark.parametrize(
    ("scales", "repeats"),
    [
        ([1.0] * 10, (Repeat(path="0", first=2, period=1, copies=6),)),
        ([1.0, 0.5] * 10, (Repeat(path="0", first=3, period=2, copies=6),)),
        ([0.1, 0.2, *[1.0] * 12, 3.0], (Repeat(path="0", first=3, period=1, copies=9),)),
        ([1.0] * 9, ()),
        ([i / 7 for i in range(20)], ()),
    ],
)
def test_layers_that_are_built_alike_are_found(scales: Sequence[float], repeats: tuple[Repeat, ...]) -> None:
    assert find_repeats(nn.ModuleList([nn.ModuleList(map(Block, scales))])) == repeats


def test_a_shared_layer_stands_for_no_other() -> None:
    assert find_repeats(nn.ModuleList([nn.ModuleList([Block()] * 20)])) == ()


def test_the_model_has_all_its_layers_again_afterwards() -> None:
    model = nn.Sequential(*(Block() for _ in range(12)))
    names = list(model.state_dict())
    (repeat,) = find_repeats(model)
    with pytest.raises(KeyError), shallow(model, (repeat,)):
        assert len(model) == 12 - repeat.copies
        raise KeyError
    assert list(model.state_dict()) == names


def test_a_graph_without_such_layers_is_refused() -> None:
    short = capture_short(source_of(Alternating))
    repeat = Repeat(path="blocks", first=2, period=1, copies=5)
    with pytest.raises(CaptureError, match="the layers of blocks cannot stand for each other"):
        ShortGraph(graph=short.graph, repeats=(repeat,)).unfold()
