"""The graph of a model computes what the model computes, bit for bit, and says where each value comes from."""

from __future__ import annotations

import copy
import resource
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
import transformers
from tests.graph.families import FAMILIES, source_of
from tests.graph.interpreter import run
from torch import Tensor, nn

from shardstage.errors import CaptureError
from shardstage.graph import ModelGraph, Ref
from shardstage.graph import capture as capture_module
from shardstage.graph.capture import capture
from shardstage.graph.capture_loops import loops_over_tokens
from shardstage.graph.tasks import InputSpec, batch_task, causal_task

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


def test_a_user_s_own_model_is_left_as_it_was() -> None:
    model = source_of("gpt2-tiny").factory().eval()
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    capture(model, microbatch=2, sequence=8)
    assert not any(module.training for module in model.modules())
    for name, parameter in model.named_parameters():
        identity, value = before[name]
        assert id(parameter) == identity and torch.equal(parameter, value)


def test_attention_masks_are_built_again_after_a_capture() -> None:
    model = source_of("llama-tiny").factory().eval()
    ids = torch.randint(0, 260, (1, 8))
    padding = torch.ones_like(ids)
    padding[:, :3] = 0
    expected = model(input_ids=ids, attention_mask=padding).logits
    capture(model, microbatch=1, sequence=8)
    assert torch.equal(model(input_ids=ids, attention_mask=padding).logits, expected)


@pytest.mark.parametrize("family", ["llama-tiny", "gpt2-tiny", "mixtral-tiny"])
def test_causal_attention_has_no_mask_to_read(family: str, graph_of: GraphOf) -> None:
    calls = [op for op in graph_of(family).ops if "scaled_dot_product_attention" in op.target]
    assert len(calls) == 2
    assert all(op.args[3] is None and op.args[5] is True for op in calls)


def test_a_padding_mask_in_the_batch_is_obeyed() -> None:
    source = source_of("llama-tiny")
    mask = InputSpec(shape=("microbatch", "sequence"), high=2)
    task = replace(source.task, inputs={**source.task.inputs, "attention_mask": mask})
    graph = capture(source, task=task, microbatch=2, sequence=8)
    assert "attention_mask" in graph.inputs
    attention = next(op for op in graph.ops if "scaled_dot_product_attention" in op.target)
    assert attention.args[3] is not None


def test_a_sliding_window_keeps_its_mask() -> None:
    config = transformers.MistralConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=50,
        sliding_window=8,
    )
    masked, plain = (
        capture(lambda: transformers.MistralForCausalLM(config), microbatch=2, sequence=length)
        for length in (16, 6)
    )
    assert [op.args[3] is None for op in masked.ops if "scaled_dot" in op.target] == [False]
    assert [op.args[3] is None for op in plain.ops if "scaled_dot" in op.target] == [True]


def test_tied_weights_are_one_parameter(graph_of: GraphOf) -> None:
    graph = graph_of("gpt2-tiny")
    embedding = next(p for p in graph.parameters if p.fqn == "transformer.wte.weight")
    assert embedding.ties == ("lm_head.weight",)
    assert len(graph.consumers[embedding.name]) == 2
    assert graph.num_parameters == sum(p.numel() for p in source_of("gpt2-tiny").factory().parameters())


def test_ops_say_which_module_and_which_line_they_come_from(graph_of: GraphOf) -> None:
    graph = graph_of("llama-tiny")
    op = next(op for op in graph.ops if Ref("p_model_layers_1_mlp_down_proj_weight") in op.args)
    assert (op.module, op.module_type) == ("model.layers.1.mlp.down_proj", "Linear")
    assert op.source.startswith("transformers/models/llama/modeling_llama.py:")
    assert "self.down_proj(" in op.source
    plain = next(op for op in graph_of("unet").ops if op.target == "aten.cat.default")
    assert plain.source.startswith("tests/graph/families.py:")


def test_values_made_without_gradients_carry_none(graph_of: GraphOf) -> None:
    graph = graph_of("llama-tiny")
    rotary = [op.outputs[0] for op in graph.ops if op.target in ("aten.cos.default", "aten.sin.default")]
    assert len(rotary) == 2
    assert not any(graph.values[name].requires_grad for name in rotary if name)


def test_a_gradient_that_the_model_stops_is_stopped_in_the_graph() -> None:
    class Stopped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(20, 8)
            self.first = nn.Linear(8, 8)
            self.second = nn.Linear(8, 20)

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.embed(input_ids)
            with torch.no_grad():
                scale = self.first(x).mean(-1, keepdim=True)
            return self.second(x * scale)

    graph = capture(Stopped, microbatch=2, sequence=4)
    linear = next(op for op in graph.ops if op.module == "first" and op.target == "aten.linear.default")
    assert not graph.values[linear.name].requires_grad
    assert {op.target for op in graph.ops if op.name.endswith(".detached")} == {"aten.detach.default"}


def test_views_say_whose_storage_they_show(graph_of: GraphOf) -> None:
    graph = graph_of("llama-tiny")
    view = next(op for op in graph.ops if op.target == "aten.view.default")
    assert graph.values[view.name].alias_of == view.inputs[0]
    linear = next(op for op in graph.ops if op.target == "aten.linear.default")
    assert graph.values[linear.name].alias_of == ""


def test_changes_in_place_become_results_of_their_own(graph_of: GraphOf) -> None:
    written = {op.args[0] for op in graph_of("resnet").ops if op.target.split(".")[1].endswith("_")}
    assert {graph_of("resnet").values[ref.name].kind for ref in written} == {"buffer"}


def test_constants_in_the_code_keep_their_values() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(20, 3)
            self.head = nn.Linear(3, 20)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.head(self.embed(input_ids) + torch.tensor([0.5, 1.5, -2.0]))

    graph = capture(Shifted, microbatch=2, sequence=4)
    assert [constant.elements for constant in graph.constants] == [(0.5, 1.5, -2.0)]
    assert graph.values[graph.constants[0].name].shape == (3,)


def test_bfloat16_casts_where_the_model_does() -> None:
    graph = capture(source_of("llama-tiny"), microbatch=2, sequence=8, dtype="bfloat16")
    assert {graph.values[p.name].dtype for p in graph.parameters} == {"bfloat16"}
    assert {graph.values[b.name].dtype for b in graph.buffers} == {"float32"}
    norm = [op for op in graph.ops if op.module == "model.norm"]
    assert graph.values[norm[0].name].dtype == "float32"
    assert graph.values[norm[-1].name].dtype == "bfloat16"
    assert graph.values[graph.output].dtype == "float32"


@pytest.mark.parametrize("family", ["llama-tiny", "resnet"])
def test_float64_is_kept_to_the_loss(family: str) -> None:
    graph = capture(source_of(family), microbatch=2, sequence=8, dtype="float64")
    assert graph.values[graph.output].dtype == "float64"


def test_a_model_of_seventy_billion_parameters_needs_no_memory() -> None:
    config = transformers.LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=2,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    graph = capture(lambda: transformers.LlamaForCausalLM(config), sequence=2048)
    grown_bytes = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert graph.parameter_bytes > 15e9
    assert grown_bytes < 0.5e9
    assert graph.is_scalable and graph.is_sequence_scalable


def test_a_loss_that_is_no_scalar_is_refused() -> None:
    def losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return model(batch["x"]).sum(-1)

    task = batch_task(losses, {"x": torch.zeros(1, 3)})
    with pytest.raises(CaptureError, match=r"must be a scalar .* a tensor of shape \(2,\)") as caught:
        capture(nn.Linear(3, 4), task=task, microbatch=2)
    assert caught.value.hint == 'cross_entropy(..., reduction="sum")'


def test_a_model_that_ignores_its_length_is_captured_at_the_length_asked_for() -> None:
    class Halves(nn.Module):
        """Splits its sequence in two: a length that is odd fits no rule."""

        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(20, 8)
            self.head = nn.Linear(8, 20)

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.embed(input_ids)
            half = x.shape[1] // 2
            return self.head(torch.cat((x[:, half:], x[:, :half]), 1))

    graph = capture(Halves, sequence=16)
    assert (graph.is_scalable, graph.is_sequence_scalable, graph.sequence) == (True, False, 16)
    assert graph.at(microbatch=3).values["input_ids"].shape == (3, 16)


class Scan(nn.Module):
    """Writes its loop over tokens out, as slow paths of state space models do; and keeps what it last made."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.head = nn.Linear(8, 20)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        self.calls = self.calls + 1
        state, states = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            state = 0.5 * state + x[:, t]
            states.append(state)
        return self.head(torch.stack(states, 1))


def test_a_long_loop_over_tokens_is_exported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was first exported at a length near, of which all that came was that the graph holds for no other."""
    exported = []

    def watched(module: nn.Module, batch: dict[str, Tensor]) -> torch.export.ExportedProgram:
        exported.append(tuple(batch["input_ids"].shape))
        return original(module, batch)

    original = capture_module._exported
    monkeypatch.setattr(capture_module, "_exported", watched)
    model = Scan()
    graph = capture(model, task=causal_task(20), sequence=200)
    assert exported == [(graph.microbatch, 200)]
    assert (graph.is_scalable, graph.is_sequence_scalable, graph.sequence) == (True, False, 200)
    assert graph.at(microbatch=3).values["input_ids"].shape == (3, 200)
    assert type(model.calls) is Tensor and model.calls == 0
    exported.clear()
    assert capture(Scan, task=causal_task(20), sequence=100).sequence == 100
    assert [length for _, length in exported] == [101, 100], "a short one is not worth asking"


def test_calls_grow_with_tokens_in_a_loop_only() -> None:
    def running(model: nn.Module) -> Callable[[int], object]:
        return lambda length: model(torch.zeros(1, length, dtype=torch.int64))

    scan, plain = Scan(), nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 20))
    assert loops_over_tokens(scan, running(scan))
    assert scan.calls == 0, "a buffer that the forward replaces is back"
    assert not loops_over_tokens(plain, running(plain))
    assert not loops_over_tokens(plain, lambda length: [plain(torch.zeros(1)) for _ in range(length // 16)])
    assert not loops_over_tokens(plain, lambda _: plain(torch.zeros(1))), "what cannot be run says nothing"
