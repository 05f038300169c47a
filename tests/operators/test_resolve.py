"""The words of a graph become torch's own functions and objects."""

from __future__ import annotations

import pytest
import torch

from shardstage.errors import CaptureError
from shardstage.graph.capture_targets import plain
from shardstage.operators.resolve import literal, resolve


def test_a_target_is_torch_s_operator() -> None:
    assert resolve("aten.linear.default") is torch.ops.aten.linear.default
    assert resolve("aten.add.Tensor") is torch.ops.aten.add.Tensor


def test_an_operator_of_a_library_is_registered_first() -> None:
    assert resolve("transformers.grouped_mm_fallback.default") is not None


@pytest.mark.parametrize("target", ["aten.linear.unheard", "aten.unheard.default", "unheard.linear.default"])
def test_an_unknown_operator_is_refused(target: str) -> None:
    with pytest.raises(CaptureError, match=f"has no operator '{target}'") as caught:
        resolve(target)
    assert caught.value.hint == "capture the model again with this version of torch"


@pytest.mark.parametrize(
    "argument",
    [None, True, 3, -1.5, "tanh", torch.bfloat16, torch.strided, torch.channels_last, torch.device("cpu")],
)
def test_a_literal_comes_back_as_it_was(argument: object) -> None:
    assert literal(plain(argument)) == argument


def test_devices_become_the_run_s_own() -> None:
    assert literal("cuda", "cpu") == torch.device("cpu")
    assert literal("cpu", torch.device("meta")) == torch.device("meta")
    assert plain(torch.device("cuda", 3)) == "cuda"


def test_lists_become_tuples() -> None:
    assert plain([1, [2, torch.float32]]) == (1, (2, "float32"))


def test_what_no_graph_can_hold_is_refused() -> None:
    with pytest.raises(CaptureError, match="known only at run time"):
        plain(torch.Generator())
