"""A graph at other sizes is the graph that a capture at those sizes gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.graph.families import FAMILIES, source_of

from shardstage.errors import CaptureError
from shardstage.graph import ModelGraph, Op, Ref, Value
from shardstage.graph.capture import capture
from shardstage.graph.scale import markers

B, S = 31, 127


def graph_with(shape: tuple[int, ...], *literals: object, sequence: int | None = S) -> ModelGraph:
    """One op that reads the batch."""
    return ModelGraph(
        ops=(Op(name="y", target="aten.view.default", args=(Ref("x"), *literals), outputs=("y",)),),
        values={
            "x": Value(name="x", shape=shape, dtype="int64", kind="input"),
            "y": Value(name="y", shape=(), dtype="int64", kind="activation"),
            "w": Value(name="w", shape=(B, S), dtype="float32", kind="parameter"),
        },
        inputs=("x",),
        parameters=(),
        output="y",
        microbatch=B,
        sequence=sequence,
        is_scalable=True,
        is_sequence_scalable=sequence is not None,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rescaled_graph_equals_a_capture_at_that_size(
    family: str, graph_of: Callable[[str], ModelGraph]
) -> None:
    rescaled = graph_of(family).at(microbatch=3, sequence=24)
    direct = capture(source_of(family), microbatch=3, sequence=24)
    assert rescaled.ops == direct.ops
    assert rescaled.values == direct.values
    assert rescaled == direct


@given(
    count=st.integers(1, 12),
    powers=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    sizes=st.tuples(st.integers(1, 64), st.integers(1, 4096)),
)
def test_every_multiple_of_the_markers_follows_the_sizes(
    count: int, powers: tuple[int, int], sizes: tuple[int, int]
) -> None:
    (i, j), (microbatch, sequence) = powers, sizes
    graph = graph_with((count * B**i * S**j,)).at(microbatch=microbatch, sequence=sequence)
    assert graph.values["x"].shape == (count * microbatch**i * sequence**j,)


def test_lengths_shifted_by_one_follow_the_length() -> None:
    graph = graph_with((B, S - 1), (S + 1, 2 * S - 1, B * (S - 1))).at(microbatch=2, sequence=10)
    assert graph.values["x"].shape == (2, 9)
    assert graph.ops[0].args[1] == (11, 19, 18)


def test_literals_that_are_no_sizes_stay() -> None:
    literals = (0, -1, 2**63 - 1, True, 0.5, "tanh", None, 64, -100)
    graph = graph_with((B, S), *literals).at(microbatch=2, sequence=10)
    assert graph.ops[0].args[1:] == literals


def test_whole_numbers_written_as_floats_are_sizes_too() -> None:
    assert graph_with((B,), float(S)).at(microbatch=2, sequence=10).ops[0].args[1] == 10.0


def test_parameters_keep_their_shape() -> None:
    assert graph_with((B,)).at(microbatch=2, sequence=10).values["w"].shape == (B, S)


def test_images_have_no_length_to_change() -> None:
    assert graph_with((B,), sequence=None).at(microbatch=2, sequence=10).sequence is None


def test_a_rescaled_graph_is_bound_to_its_sizes() -> None:
    graph = graph_with((B, S)).at(microbatch=2, sequence=10)
    assert graph.at(microbatch=2, sequence=10) is graph
    with pytest.raises(CaptureError, match="microbatches of 2 samples only, not 3"):
        graph.at(microbatch=3)
    with pytest.raises(CaptureError, match="sequences of 10 tokens only, not 11") as caught:
        graph.at(microbatch=2, sequence=11)
    assert caught.value.hint == "capture(model, sequence=11)"


def test_markers_divide_nothing_of_the_model() -> None:
    microbatch, sequence = markers([2 * 1009, 128, 131, 260, 344], sequence=128, max_sequence=None)
    assert microbatch == 1013
    assert sequence == 137  # 131 is a size of the model


def test_a_marker_is_not_next_to_a_power_of_two_which_would_be_taken_for_a_shifted_length() -> None:
    assert markers([64], sequence=127)[1] == 131


def test_a_marker_stays_within_the_model_s_positions() -> None:
    assert markers([64], sequence=512, max_sequence=512)[1] == 509


def test_a_marker_may_divide_what_is_next_to_a_size() -> None:
    assert markers([16, 24, 50, 96], sequence=128, max_sequence=31)[1] == 29  # 2**6 + 1 is no size


def test_a_short_model_without_a_marker_has_a_fixed_length() -> None:
    assert markers([64], sequence=8, max_sequence=8)[1] is None
