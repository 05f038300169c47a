"""FLOPs of a graph are what torch's own counter sees in a real run of the eager model, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.graph.accounting_cases import case_of, measure
from tests.graph.families import FAMILIES, source_of
from tests.graph.small_graphs import call, graph, value
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from shardstage.graph import ModelGraph, Op, Ref, Value
from shardstage.graph.flops import backward_flops, forward_flops, is_product, moved_bytes

GraphOf = Callable[[str], ModelGraph]


def totals(found: ModelGraph) -> tuple[int, int]:
    return (
        sum(forward_flops(found, op) for op in found.ops),
        sum(backward_flops(found, op) for op in found.ops),
    )


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "lstm"])
def test_a_family_costs_what_the_flop_counter_sees(graph_of: GraphOf, name: str) -> None:
    found = case_of(source_of(name), graph_of(name))
    seen = measure(found)
    unseen = experts(found.graph)
    assert totals(found.graph) == (seen.forward_flops + unseen, seen.backward_flops + 2 * unseen)


def experts(graph: ModelGraph) -> int:
    """FLOPs of tokens meeting their experts' matrices, which run inside one op of transformers that the counter does not look into."""
    rows_and_weights = (
        (graph.values[op.inputs[0]].shape, graph.values[op.inputs[1]].shape)
        for op in graph.ops
        if op.target == "transformers.grouped_mm_fallback.default"
    )
    return sum(2 * rows * k * n for (rows, k), (_, _, n) in rows_and_weights)


def single(target: str, arguments: Mapping[str, Tensor], *further: Any, **keywords: Any) -> ModelGraph:
    """A graph of one op, for tensors that say which shapes and which of them require gradients."""
    function = torch.ops.aten
    for word in target.split(".")[1:]:
        function = getattr(function, word)
    output = function(*arguments.values(), *further, **keywords)
    values = [
        Value(
            name=name,
            shape=tuple(tensor.shape),
            dtype="float32",
            kind="input",
            requires_grad=tensor.requires_grad,
        )
        for name, tensor in arguments.items()
    ]
    op = call("y", target, *arguments, *further, kwargs=tuple(keywords.items()))
    made = value("y", tuple(output.shape), requires_grad=output.requires_grad)
    return graph([op], [*values, made], output="y")


def counted(target: str, arguments: Mapping[str, Tensor], *further: Any, **keywords: Any) -> tuple[int, int]:
    function = torch.ops.aten
    for word in target.split(".")[1:]:
        function = getattr(function, word)
    with FlopCounterMode(display=False) as counter:
        output = function(*arguments.values(), *further, **keywords)
        forward = counter.get_total_flops()
        if output.requires_grad:
            output.sum().backward()
    return forward, counter.get_total_flops() - forward


def tensor(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(shape).requires_grad_(grad)


CALLS = {
    "linear with bias": ("aten.linear.default", {"x": (2, 5, 3), "w": (7, 3), "b": (7,)}, ()),
    "linear of a vector": ("aten.linear.default", {"x": (4, 3), "w": (7, 3)}, ()),
    "linear of no heads": ("aten.linear.default", {"x": (4, 0), "w": (7, 0)}, ()),
    "mm": ("aten.mm.default", {"a": (4, 3), "b": (3, 7)}, ()),
    "addmm": ("aten.addmm.default", {"c": (7,), "a": (4, 3), "b": (3, 7)}, ()),
    "bmm": ("aten.bmm.default", {"a": (2, 4, 3), "b": (2, 3, 7)}, ()),
    "baddbmm": ("aten.baddbmm.default", {"c": (2, 4, 7), "a": (2, 4, 3), "b": (2, 3, 7)}, ()),
    "matmul folded": ("aten.matmul.default", {"a": (2, 4, 3), "b": (3, 7)}, ()),
    "matmul broadcast": ("aten.matmul.default", {"a": (5, 1, 4, 3), "b": (2, 3, 7)}, ()),
    "conv1d": ("aten.conv1d.default", {"x": (2, 3, 9), "w": (4, 3, 3)}, (None, [2], [1])),
    "conv2d": ("aten.conv2d.default", {"x": (2, 3, 9, 8), "w": (4, 3, 3, 2)}, (None, [2, 1], [1, 0])),
    "conv3d": ("aten.conv3d.default", {"x": (1, 2, 5, 5, 5), "w": (3, 2, 2, 2, 2)}, ()),
    "transposed": ("aten.conv_transpose2d.input", {"x": (2, 3, 5, 5), "w": (3, 4, 3, 3)}, (None, [2, 2])),
}


@pytest.mark.parametrize("frozen", [(), (0,), (1,)], ids=["all learn", "first frozen", "second frozen"])
@pytest.mark.parametrize("name", CALLS)
def test_an_op_costs_what_the_flop_counter_sees(name: str, frozen: tuple[int, ...]) -> None:
    target, shapes, further = CALLS[name]
    names = list(shapes)
    first = names.index("a") if "a" in names else 0  # a summand comes before the factors
    still = {names[first + index] for index in frozen}
    arguments = {key: tensor(*shape, grad=key not in still) for key, shape in shapes.items()}
    assert totals(single(target, arguments, *further)) == counted(target, arguments, *further)


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("bij,bjk->bik", ((2, 3, 4), (2, 4, 5))),
        ("bhqd,bhkd->bhqk", ((2, 3, 4, 5), (2, 3, 6, 5))),
        ("i,j->ij", ((3,), (4,))),
        ("ij,jk,kl->il", ((2, 3), (3, 4), (4, 5))),
    ],
)
def test_an_einsum_costs_what_its_products_cost(equation: str, shapes: tuple[tuple[int, ...], ...]) -> None:
    operands = [tensor(*shape) for shape in shapes]
    with FlopCounterMode(display=False) as counter:
        output = torch.ops.aten.einsum.default(equation, operands, path=None)
        forward = counter.get_total_flops()
        output.sum().backward()
    names = [f"x{i}" for i in range(len(operands))]
    op = call("y", "aten.einsum.default", equation, tuple(map(Ref, names)))
    op = replace(op, args=(equation, op.args[1]))
    values = [value(n, s, kind="input", requires_grad=True) for n, s in zip(names, shapes, strict=True)]
    found = graph([op], [*values, value("y", tuple(output.shape), requires_grad=True)], output="y")
    assert totals(found) == (forward, counter.get_total_flops() - forward)


def test_a_grouped_convolution_costs_its_share() -> None:
    """torch counts the weight gradient of g groups g times too often; forward and input gradient agree."""
    whole = single("aten.conv2d.default", {"x": tensor(1, 8, 5, 5), "w": tensor(8, 8, 3, 3)})
    depthwise = single(
        "aten.conv2d.default",
        {"x": tensor(1, 8, 5, 5), "w": tensor(8, 1, 3, 3)},
        None,
        [1, 1],
        [0, 0],
        [1, 1],
        8,
    )
    assert [8 * flops for flops in totals(depthwise)] == list(totals(whole))


def written_out(model: nn.LSTM, x: Tensor) -> Tensor:
    """The same cells by hand: [steps, batch, features]."""
    for layer in range(model.num_layers):
        w_ih, w_hh, *_ = model.all_weights[layer]
        h = c = torch.zeros(x.shape[1], model.hidden_size)
        states = []
        for step in x.unbind():
            i, f, g, o = (step @ w_ih.t() + h @ w_hh.t()).chunk(4, dim=-1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            states.append(h)
        x = torch.stack(states)
    return x


@pytest.mark.parametrize("needs_input_gradient", [False, True])
def test_an_lstm_costs_what_its_cells_cost_written_out(needs_input_gradient: bool) -> None:
    model, x = nn.LSTM(6, 5, 2), tensor(7, 3, 6, grad=needs_input_gradient)
    with FlopCounterMode(display=False) as counter:
        output = written_out(model, x)
        forward = counter.get_total_flops()
        output.sum().backward()
    assert totals(recurrent_graph(model, needs_input_gradient)) == (
        forward,
        counter.get_total_flops() - forward,
    )


def recurrent_graph(model: nn.LSTM, needs_input_gradient: bool) -> ModelGraph:
    weights = [
        value(f"w{i}", tuple(weight.shape), kind="parameter", requires_grad=True)
        for i, weight in enumerate(weight for layer in model.all_weights for weight in layer)
    ]
    values = [
        value("x", (7, 3, 6), kind="input", requires_grad=needs_input_gradient),
        value("h", (2, 3, 5), kind="input"),
        value("c", (2, 3, 5), kind="input"),
        *weights,
        value("y", (7, 3, 5), requires_grad=True),
    ]
    states, weights_given = (Ref("h"), Ref("c")), tuple(Ref(weight.name) for weight in weights)
    args = (Ref("x"), states, weights_given, True, 2, 0.0, True, False, False)
    op = Op(name="y", target="aten.lstm.input", args=args, outputs=("y", None, None), returns_sequence=True)
    return graph([op], values, output="y")


def test_the_recurrent_family_costs_its_weights_once_a_step(graph_of: GraphOf) -> None:
    found = graph_of("lstm").at(microbatch=2, sequence=32)
    matrices = sum(
        found.values[p.name].numel
        for p in found.parameters
        if "lstm.weight" in p.fqn or "head.weight" in p.fqn
    )
    assert totals(found)[0] == 2 * 2 * 32 * matrices


@pytest.mark.parametrize("group", [1, 2])
def test_attention_with_grouped_heads_costs_as_much_as_with_all(group: int) -> None:
    q, k = value("q", (2, 4, 6, 8)), value("k", (2, 4 // group, 6, 8))
    values = [replace(v, requires_grad=True) for v in (q, k, replace(k, name="v"), replace(q, name="y"))]
    op = call("y", "aten.scaled_dot_product_attention.default", "q", "k", "v")
    assert totals(graph([op], values, output="y")) == (4 * 2 * 4 * 6 * 6 * 8, 10 * 2 * 4 * 6 * 6 * 8)


def test_what_requires_no_gradient_has_no_backward(graph_of: GraphOf) -> None:
    found = graph_of("llama-tiny")
    still = {name: replace(v, requires_grad=False) for name, v in found.values.items()}
    forward, backward = totals(replace(found, values=still))
    assert forward > 0
    assert backward == 0


def test_flops_follow_the_sizes(graph_of: GraphOf) -> None:
    small, large = (graph_of("gpt2-tiny").at(microbatch=b, sequence=32) for b in (1, 3))
    assert [3 * flops for flops in totals(small)] == list(totals(large))


def test_only_products_have_flops() -> None:
    assert is_product(call("y", "aten.linear.default"))
    assert not is_product(call("y", "aten.softmax.int"))
    assert not is_product(call("y", "shardstage.all_reduce"))


def test_an_op_moves_what_it_reads_and_writes_and_a_view_nothing() -> None:
    values = [
        value("x", (2, 3), kind="input"),
        value("y", (2, 3)),
        value("v", (3, 2), alias_of="y"),
        value("r", (2, 3), alias_of="y"),
    ]
    add = call("y", "aten.add.Tensor", "x", "x")
    view = call("v", "aten.view.default", "y", (3, 2))
    relu = call("r", "aten.relu_.default", "y")
    found = graph([add, view, relu], values, output="v")
    assert [moved_bytes(found, op) for op in found.ops] == [48, 0, 48]


def test_a_look_up_moves_the_rows_that_it_reads() -> None:
    values = [
        value("table", (1000, 4), kind="parameter"),
        value("ids", (2, 3), kind="input", dtype="int64"),
        value("y", (2, 3, 4)),
    ]
    found = graph([call("y", "aten.embedding.default", "table", "ids")], values, output="y")
    assert moved_bytes(found, found.ops[0]) == 2 * 2 * 3 * 4 * 4 + 2 * 3 * 8
