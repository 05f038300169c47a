"""Any graph cut anywhere: the stages run one after the other compute the whole, and nothing travels that need not."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.graph.families import FAMILIES
from tests.graph.small_graphs import Interpreter, call, graph, random_graph, value

from shardstage.errors import PlanError
from shardstage.graph import ModelGraph
from shardstage.graph.cuts import (
    Segment,
    all_crossing_bytes,
    crossing,
    crossing_bytes,
    cut,
    good_positions,
    shared_parameters,
)

GraphOf = Callable[[str], ModelGraph]
STORED = ("input", "parameter", "buffer", "constant")


def rotary_stack(layers: int = 3) -> ModelGraph:
    """Layers that all read one table, which follows cheaply from the batch."""
    values = [
        value("ids", kind="input", dtype="int64"),
        value("w", kind="parameter", requires_grad=True),
        value("table"),
        value("cosine", alias_of=""),
        value("h0", requires_grad=True),
    ]
    ops = [
        call("table", "aten.sin.default", "ids"),
        call("cosine", "aten.cos.default", "table"),
        call("h0", "aten.embedding.default", "w", "ids"),
    ]
    for n in range(layers):
        ops.append(call(f"a{n}", "aten.mul.Tensor", f"h{n}", "cosine", module=f"layers.{n}"))
        ops.append(call(f"h{n + 1}", "aten.add.Tensor", f"a{n}", f"h{n}", module=f"layers.{n}"))
        values += [value(f"a{n}", requires_grad=True), value(f"h{n + 1}", requires_grad=True)]
    ops.append(call("loss", "aten.mul.Tensor", f"h{layers}", "w"))
    return graph(ops, [*values, value("loss", (), requires_grad=True)], output="loss")


def random_starts(whole: ModelGraph, draw: random.Random) -> list[int]:
    inner = range(1, len(whole.ops))
    return [0, *sorted(draw.sample(inner, k=draw.randint(0, min(4, len(inner)))))]


def run_in_stages(interpreter: Interpreter, whole: ModelGraph, segments: Sequence[Segment]) -> int | None:
    """Each stage knows the batch, its stored values, and what was sent to it: nothing else."""
    sent: dict[tuple[int, str], int] = {}
    last: int | None = None
    for segment in segments:
        known = {
            name: sent[segment.index, name] if (segment.index, name) in sent else interpreter.number(name)
            for name, v in segment.graph.values.items()
            if v.kind in STORED
        }
        interpreter.run(segment.graph.ops, known)
        sent.update({(edge.target, edge.value): known[edge.value] for edge in segment.sends})
        last = known.get(whole.output, last)
    return last


def same_result(whole: ModelGraph, starts: Sequence[int]) -> bool:
    interpreter = Interpreter()
    in_stages = run_in_stages(interpreter, whole, cut(whole, starts))
    interpreter.num_draws = 0
    known = {name: interpreter.number(name) for name, v in whole.values.items() if v.kind in STORED}
    interpreter.run(whole.ops, known)
    return in_stages == known[whole.output]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_stages_run_one_after_the_other_compute_the_whole(seed: int) -> None:
    whole = random_graph(seed)
    assert same_result(whole, random_starts(whole, random.Random(seed)))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_every_op_runs_in_one_stage_unless_it_is_cheap(seed: int) -> None:
    whole = random_graph(seed)
    segments = cut(whole, random_starts(whole, random.Random(seed)))
    counts = Counter(op.name for segment in segments for op in segment.graph.ops)
    for op in whole.ops:
        needs_grad = any(whole.values[name].requires_grad for name in op.inputs)
        is_fixed = needs_grad or "rand" in op.target or op.target.startswith("shardstage.")
        assert counts[op.name] == 1 if is_fixed else True


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_stage_holds_all_that_it_reads_and_nothing_else(seed: int) -> None:
    whole = random_graph(seed)
    for segment in cut(whole, random_starts(whole, random.Random(seed))):
        part = segment.graph
        touched = {name for op in part.ops for name in (*op.inputs, *op.outputs)}
        assert set(part.values) == touched
        stored = {*part.inputs, *(p.name for p in (*part.parameters, *part.buffers))}
        assert stored == touched - set(part.producer)
        assert {edge.value for edge in segment.receives} <= set(part.inputs)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_what_crosses_is_what_two_stages_send(seed: int) -> None:
    whole = random_graph(seed)
    for position in range(1, len(whole.ops)):
        first, second = cut(whole, (0, position))
        assert tuple(edge.value for edge in first.sends) == crossing(whole, position)
        assert second.receives == first.sends


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_bytes_of_all_positions_are_those_of_each(seed: int) -> None:
    whole = random_graph(seed)
    each = tuple(crossing_bytes(whole, position) for position in range(len(whole.ops) + 1))
    assert all_crossing_bytes(whole) == each


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_cut_at_its_good_positions_computes_the_whole(graph_of: GraphOf, name: str) -> None:
    whole = graph_of(name)
    assert same_result(whole, (0, *good_positions(whole)))


@pytest.mark.parametrize("name", ["llama-tiny", "gpt2-tiny", "bert-tiny", "vit-tiny", "mixtral-tiny"])
def test_between_two_layers_only_the_residual_stream_travels(graph_of: GraphOf, name: str) -> None:
    whole = graph_of(name)
    width = max(whole.values[crossing(whole, p)[0]].shape[-1] for p in good_positions(whole)[1:3])
    borders = [p for p in good_positions(whole) if "1" in whole.ops[p].module.split(".")]
    assert borders
    for position in borders:
        (name_of_stream,) = crossing(whole, position)
        assert whole.values[name_of_stream].shape[-1] == width


def test_a_decoder_stage_receives_the_encoder_result_and_the_bias_besides(graph_of: GraphOf) -> None:
    whole = graph_of("t5-tiny")
    layer = next(i for i, op in enumerate(whole.ops) if op.module.startswith("decoder.block.1"))
    assert len(crossing(whole, layer)) == 3


def test_the_skip_of_a_u_net_goes_straight_to_the_stage_that_reads_it(graph_of: GraphOf) -> None:
    whole = graph_of("unet")
    first = next(i for i, op in enumerate(whole.ops) if op.module.startswith("down2"))
    middle = next(i for i, op in enumerate(whole.ops) if op.module.startswith("rise2"))
    last = next(i for i, op in enumerate(whole.ops) if op.module.startswith("rise1"))
    segments = cut(whole, (0, first - 1, middle, last))
    targets = Counter(edge.target for edge in segments[0].sends)
    assert targets == {1: 1, 3: 1}
    assert [e.source for e in segments[3].receives] == [0, 2]


def test_a_cheap_table_is_computed_again_and_never_sent() -> None:
    whole = rotary_stack()
    segments = cut(whole, (0, 5, 7))
    assert [[op.name for op in s.graph.ops[: s.num_recomputed]] for s in segments] == [
        [],
        ["table", "cosine"],
        ["table", "cosine"],
    ]
    assert [[edge.value for edge in s.sends] for s in segments] == [["h1"], ["h2"], []]
    assert segments[1].graph.inputs == ("ids", "h1")


def test_a_cheap_table_stays_out_of_a_stage_that_does_not_read_it() -> None:
    whole = rotary_stack()
    first, last = cut(whole, (0, 9))
    assert "cosine" in first.graph.values
    assert "cosine" not in last.graph.values


def test_random_numbers_and_long_products_are_sent_rather_than_computed_again() -> None:
    values = [
        value("x", (4, 64), kind="input"),
        value("noise", (4, 64)),
        value("gram", (4, 4)),
        value("outer", (64, 64)),
        value("column", (64, 1), kind="buffer"),
        value("row", (1, 64), kind="buffer"),
        value("y", (4, 64), requires_grad=True),
        value("w", (4, 64), kind="parameter", requires_grad=True),
    ]
    ops = [
        call("noise", "aten.rand_like.default", "x"),
        call("gram", "aten.mm.default", "x", "x"),
        call("outer", "aten.mm.default", "column", "row"),
        call("y", "aten.mul.Tensor", "w", "noise", "gram", "outer"),
    ]
    assert crossing(graph(ops, values, output="y"), 3) == ("noise", "gram")


@pytest.mark.parametrize(("operator", "travelling"), [("narrow", ()), ("all_gather", ("part",))])
def test_of_our_own_operators_those_that_do_not_communicate_are_cheap(
    operator: str, travelling: tuple[str, ...]
) -> None:
    values = [
        value("x", kind="input"),
        value("part"),
        value("w", kind="parameter", requires_grad=True),
        value("y", requires_grad=True),
    ]
    ops = [
        call("part", f"shardstage.{operator}", "x"),
        call("y", "aten.mul.Tensor", "w", "part"),
    ]
    assert crossing(graph(ops, values, output="y"), 1) == travelling


def test_a_gradient_flows_back_over_an_edge_only_if_the_value_has_one() -> None:
    values = [
        value("x", kind="input"),
        value("w", kind="parameter", requires_grad=True),
        value("frozen", kind="parameter"),
        value("f"),
        value("y", requires_grad=True),
        value("z", requires_grad=True),
    ]
    ops = [
        call("f", "aten.mul.Tensor", "x", "frozen"),
        call("y", "aten.mul.Tensor", "f", "w"),
        call("z", "aten.add.Tensor", "f", "y"),
    ]
    first, _ = cut(graph(ops, values, output="z"), (0, 2))
    assert [(edge.value, edge.requires_grad) for edge in first.sends] == [("f", False), ("y", True)]


def test_a_received_value_is_an_input_with_storage_of_its_own() -> None:
    whole = rotary_stack()
    viewed = replace(whole.values["h1"], alias_of="a0")
    further = replace(whole.values["a1"], alias_of="a0")
    _, second = cut(replace(whole, values={**whole.values, "h1": viewed, "a1": further}), (0, 5))
    received = second.graph.values["h1"]
    assert (received.kind, received.alias_of, received.requires_grad) == ("input", "", True)
    assert second.graph.values["a1"].alias_of == "h1"


def test_only_the_last_stage_has_the_output() -> None:
    assert [segment.graph.output for segment in cut(rotary_stack(), (0, 5, 7))] == ["", "", "loss"]


def test_a_parameter_of_two_stages_is_listed_with_both(graph_of: GraphOf) -> None:
    assert shared_parameters(cut(rotary_stack(), (0, 5, 7))) == {"net.w": (0, 2)}
    gpt2 = graph_of("gpt2-tiny")
    tied = shared_parameters(cut(gpt2, (0, *good_positions(gpt2)[1:3])))
    assert list(tied.values()) == [(0, 2)]


def test_stages_know_their_parts_of_the_blocks(graph_of: GraphOf) -> None:
    whole = graph_of("llama-tiny")
    starts = (0, *(p for p in good_positions(whole) if "post_attention" in whole.ops[p].module))
    for segment in cut(whole, starts):
        assert [b.start for b in segment.blocks] == [0, *(b.stop for b in segment.blocks[:-1])]
        assert segment.blocks[-1].stop == len(segment.graph.ops)
    _, second, *_ = cut(whole, starts)
    assert [b.is_layer for b in second.blocks] == [False, True, True]


def in_place() -> ModelGraph:
    values = [
        value("x", kind="input"),
        value("w", kind="parameter", requires_grad=True),
        value("count", (), kind="buffer", dtype="int64"),
        value("y", requires_grad=True),
        value("r", requires_grad=True, alias_of="y"),
        value("z", requires_grad=True),
    ]
    ops = [
        call("count_up", "aten.add_.Tensor", "count", 1, outputs=(None,)),
        call("y", "aten.mul.Tensor", "x", "w"),
        call("r", "aten.relu_.default", "y"),
        call("z", "aten.mul.Tensor", "r", "y"),
    ]
    return graph(ops, values, output="z")


def test_a_tensor_is_not_cut_off_from_its_change_in_place() -> None:
    with pytest.raises(PlanError, match=r"a stage cannot start at op 'r' .*changed in place") as caught:
        cut(in_place(), (0, 2))
    assert caught.value.hint == "start at op 'z'"


def test_an_op_that_changes_a_buffer_runs_once() -> None:
    segments = cut(in_place(), (0, 3))
    assert [[op.name for op in s.graph.ops] for s in segments] == [["count_up", "y", "r"], ["z"]]


@pytest.mark.parametrize("starts", [(), (1,), (0, 0), (0, 3, 2), (0, 99)])
def test_stages_that_do_not_tile_the_graph_are_refused(starts: tuple[int, ...]) -> None:
    with pytest.raises(PlanError, match="stages cannot start at ops"):
        cut(rotary_stack(), starts)


def test_good_positions_lie_where_the_fewest_bytes_of_a_block_travel(graph_of: GraphOf) -> None:
    whole = graph_of("llama-tiny")
    num_bytes = all_crossing_bytes(whole)
    assert {num_bytes[p] for p in good_positions(whole)} == {num_bytes[good_positions(whole)[0]]}
    assert [whole.ops[p].module for p in good_positions(whole)][:2] == [
        "model.layers.0.input_layernorm",
        "model.layers.0.post_attention_layernorm",
    ]


def test_five_thousand_ops_are_cut_in_linear_time() -> None:
    """By counting look-ups rather than seconds: twice the ops, about twice the look-ups."""
    counts = []
    for layers in (200, 400):
        whole = rotary_stack(layers)
        counted = _Counting(whole.values)
        all_crossing_bytes(replace(whole, values=counted))
        counts.append(counted.num_reads)
    assert counts[1] < 2.2 * counts[0]


class _Counting(dict[str, Any]):
    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.num_reads = 0

    def __getitem__(self, name: str) -> Any:
        self.num_reads += 1
        return super().__getitem__(name)
