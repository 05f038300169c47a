"""A traced program becomes ops that make every value once, and computes the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from tests.graph.interpreter import run
from torch import Tensor, nn

from shardstage.errors import CaptureError
from shardstage.graph import ModelGraph
from shardstage.graph.capture import capture
from shardstage.graph.normalise import is_mutating
from shardstage.graph.tasks import batch_task


class Lambda(nn.Module):
    """A layer before a function of its output."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.register_buffer("seen", torch.zeros(6))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x))


def summed(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return model(batch["x"]).double().pow(2).sum()


def captured(model: nn.Module) -> ModelGraph:
    return capture(model, task=batch_task(summed, {"x": torch.zeros(4, 6)}), microbatch=4)


def assert_equal_training(model: nn.Module, graph: ModelGraph) -> None:
    x = torch.randn(4, 6)
    parameters = list(model.parameters())
    expected = summed(model, {"x": x})
    gradients = torch.autograd.grad(expected, parameters)
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    found = run(graph, state, {"x": x})
    assert torch.equal(expected, found)
    for mine, theirs in zip(torch.autograd.grad(found, parameters), gradients, strict=True):
        assert torch.equal(mine, theirs)


def shifted(y: Tensor) -> Tensor:
    z = torch.zeros_like(y)
    z[:, 1:] = y[:, :-1]
    return z


def through_a_chain(y: Tensor) -> Tensor:
    z = y.clone()
    z.transpose(0, 1)[2:4].mul_(3)
    return z


def with_other_views(y: Tensor) -> Tensor:
    z = y * 2
    flat, row = z.view(-1), z[1]
    row.add_(1)
    return flat * z.reshape(-1)


def twice(y: Tensor) -> Tensor:
    z = y * 2
    z[0] = 1.0
    z[:, 0] = 2.0
    z.relu_()
    return z


def zeroed(y: Tensor) -> Tensor:
    z = y * 1
    z[:, 2].zero_()
    z[1:3, 0] = y[0, 0]
    return z


def under_no_grad(y: Tensor) -> Tensor:
    scale = torch.ones_like(y)
    with torch.no_grad():
        scale[:, ::2] *= 0.5
    return y * scale


def and_in_place(y: Tensor) -> Tensor:
    mask = y > 0
    mask &= y < 1
    return y * mask


@pytest.mark.parametrize(
    "function",
    [
        shifted,
        through_a_chain,
        with_other_views,
        twice,
        zeroed,
        under_no_grad,
        and_in_place,
        lambda y: y.permute(1, 0).clone().permute(1, 0).mul_(2),
        lambda y: y.clone().unsqueeze(0).squeeze(0).add_(1),
    ],
)
def test_a_change_in_place_is_followed_into_every_view(function: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = Lambda(function)
    graph = captured(model)
    assert not any(is_mutating(op.target) for op in graph.ops)
    assert_equal_training(model, graph)


def test_a_buffer_is_really_changed() -> None:
    class Counting(Lambda):
        def forward(self, x: Tensor) -> Tensor:
            self.seen[:3].add_(x.detach().sum())
            return self.layer(x) + self.seen

    model = Counting(nn.Identity())
    graph = captured(model)
    assert [op.target for op in graph.ops if is_mutating(op.target)] == ["aten.add_.Tensor"]
    x = torch.ones(4, 6)
    run(graph, dict(model.named_parameters()) | dict(model.named_buffers()), {"x": x})
    assert model.seen.tolist() == [24.0, 24.0, 24.0, 0.0, 0.0, 0.0]


def test_what_nobody_reads_is_left_out() -> None:
    def wasteful(y: Tensor) -> Tensor:
        y.exp().sum()
        return y

    assert "aten.exp.default" not in {op.target for op in captured(Lambda(wasteful)).ops}


def test_unused_outputs_have_no_name() -> None:
    graph = captured(Lambda(lambda y: y.split(2, dim=1)[1]))
    split = next(op for op in graph.ops if op.target == "aten.split.Tensor")
    assert split.returns_sequence
    assert [output is None for output in split.outputs] == [True, False, True]


def test_conversions_that_convert_nothing_are_left_out() -> None:
    graph = captured(Lambda(lambda y: y.to(torch.float32).contiguous().float()))
    assert [op.target for op in graph.ops if op.target.startswith("aten.to")] == [
        "aten.to.dtype"
    ]  # to float64


def test_autocast_inside_a_model_is_refused_with_its_line() -> None:
    def casting(y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return y @ y.T

    with pytest.raises(CaptureError, match="switches autocast on by itself") as caught:
        captured(Lambda(casting))
    assert caught.value.hint == 'leave the dtype to the run: precision = "bfloat16"'


def test_autocast_switched_off_is_nothing() -> None:
    def uncast(y: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return y.exp()

    model = Lambda(uncast)
    assert_equal_training(model, captured(model))


def test_a_size_known_only_at_run_time_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"data-dependent control flow\n  at .*test_normalise\.py:\d+: "):
        captured(Lambda(lambda y: y[: int(y.sum().item())]))


def test_a_view_that_cannot_be_written_through_is_refused() -> None:
    def diagonal_of_windows(y: Tensor) -> Tensor:
        z = y.clone()
        z.unfold(1, 2, 2)[0].mul_(2)
        return z

    with pytest.raises(CaptureError, match=r"through a view made by aten\.unfold\.default") as caught:
        captured(Lambda(diagonal_of_windows))
    assert caught.value.hint == "write to the tensor itself, or make a new one"
