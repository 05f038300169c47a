"""FLOPs and bytes moved of one operator call, from the shapes in its graph.

A multiplication and an addition count as two FLOPs; only matrix products count (linear, matmul, convolution, attention, recurrent
cells), as in ``torch.utils.flop_counter``, so that figures compare with published ones. The rest is priced by ``moved_bytes``.

The gradient of a product ``y = a · b`` needs one product of the same size per operand that requires a gradient. Fused attention
is the exception: its backward runs five products to the forward's two, because it computes the scores again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from shardstage.graph.model_graph import ModelGraph, Op, Ref, Value

__all__ = ["backward_flops", "forward_flops", "is_product", "moved_bytes"]


def forward_flops(graph: ModelGraph, op: Op) -> int:
    """FLOPs of one call; 0 for an op that is no product."""
    formula = _FORMULAS.get(_family(op))
    return 0 if formula is None else formula(_Call(graph.values, op)).forward


def backward_flops(graph: ModelGraph, op: Op) -> int:
    """FLOPs of its backward; 0 if nothing that it returns requires a gradient."""
    if not any(out is not None and graph.values[out].requires_grad for out in op.outputs):
        return 0
    formula = _FORMULAS.get(_family(op))
    return 0 if formula is None else formula(_Call(graph.values, op)).backward


def is_product(op: Op) -> bool:
    """True for matrix products in the wide sense: the ops that have FLOPs."""
    return _family(op) in _FORMULAS


def moved_bytes(graph: ModelGraph, op: Op) -> int:
    """Bytes that one call reads and writes: 0 for a view, only the rows that are read for a table look-up."""
    outputs = [graph.values[name] for name in op.outputs if name is not None]
    family = _family(op)
    if outputs and all(value.alias_of for value in outputs) and not family.endswith("_"):
        return 0
    written = sum(value.num_bytes for value in outputs)
    if family in _LOOK_UPS:
        return 2 * written + sum(graph.values[name].num_bytes for name in op.inputs[1:])
    return written + sum(graph.values[name].num_bytes for name in op.inputs)


_LOOK_UPS: Final = frozenset({"aten.embedding", "aten.index_select", "aten.gather", "shardstage.embedding"})


@dataclass(frozen=True, slots=True)
class _Flops:
    forward: int
    backward: int


class _Call:
    """An op's arguments with the shapes of the values among them."""

    def __init__(self, values: Mapping[str, Value], op: Op) -> None:
        self._values = values
        self._op = op
        self._kwargs = dict(op.kwargs)

    def argument(self, position: int, keyword: str = "", default: Any = None) -> Any:
        if position < len(self._op.args):
            return self._op.args[position]
        return self._kwargs.get(keyword, default)

    def value(self, position: int, keyword: str = "") -> Value:
        return self.resolve(self.argument(position, keyword))

    def resolve(self, argument: Any) -> Value:
        assert isinstance(argument, Ref)
        return self._values[argument.name]

    def output(self) -> Value:
        name = self._op.outputs[0]
        assert name is not None
        return self._values[name]


def _family(op: Op) -> str:
    """``aten.linear.default`` → ``aten.linear``."""
    return ".".join(op.target.split(".")[:2])


def _product(flops: int, *operands: Value) -> _Flops:
    return _Flops(flops, flops * sum(operand.requires_grad for operand in operands))


def _linear(call: _Call) -> _Flops:
    x, weight = call.value(0), call.value(1)  # [..., k], [n, k]
    return _product(2 * x.numel * math.prod(weight.shape[:-1]), x, weight)


def _matrix_product(first: int) -> Callable[[_Call], _Flops]:
    """mm, bmm and, with a summand before the factors, addmm and baddbmm: [.., m, k] · [.., k, n]."""

    def flops(call: _Call) -> _Flops:
        a, b = call.value(first), call.value(first + 1)
        return _product(2 * a.numel * b.shape[-1], a, b)

    return flops


def _matmul(call: _Call) -> _Flops:
    """With broadcast batch dims; a product with a vector is not counted, as in torch."""
    a, b = call.value(0), call.value(1)
    if (len(a.shape) < 2 and len(b.shape) < 2) or len(b.shape) == 1:
        return _Flops(0, 0)
    columns = b.shape[-1]
    rows = a.shape[-2] if len(a.shape) > 1 else 1
    return _product(2 * _broadcast_numel(a.shape[:-2], b.shape[:-2]) * rows * a.shape[-1] * columns, a, b)


def _broadcast_numel(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    width = max(len(a), len(b))
    padded = ((1,) * (width - len(shape)) + shape for shape in (a, b))
    return math.prod(max(i, j) if min(i, j) else 0 for i, j in zip(*padded, strict=True))


def _grouped(call: _Call) -> _Flops:
    """Rows sorted by expert meet their expert's matrix: [rows, k] · [experts, k, n]."""
    a, b = call.value(0), call.value(1)
    return _product(2 * a.numel * b.shape[-1], a, b)


def _einsum(call: _Call) -> _Flops:
    """Operands are contracted from left to right, as torch does without opt_einsum; a plain outer product costs no product."""
    equation = str(call.argument(0)).replace(" ", "")
    operands = [call.resolve(item) for item in call.argument(1)]
    terms, _, result = equation.partition("->")
    letters = terms.split(",")
    if "." in equation or len(letters) != len(operands):
        return _Flops(0, 0)
    sizes = {
        letter: size
        for term, operand in zip(letters, operands, strict=True)
        for letter, size in zip(term, operand.shape, strict=True)
    }
    forward = backward = 0
    left, needs_grad = set(letters[0]), operands[0].requires_grad
    for number, operand in enumerate(operands[1:], start=1):
        right = set(letters[number])
        kept = set(result).union(*letters[number + 1 :])
        if contracted := (left & right) - kept:
            flops = 2 * math.prod(sizes[letter] for letter in ((left | right) & kept) | contracted)
            forward += flops
            backward += flops * (needs_grad + operand.requires_grad)
        left, needs_grad = (left | right) & kept, needs_grad or operand.requires_grad
    return _Flops(forward, backward)


def _convolution(call: _Call) -> _Flops:
    """A weight [c_out, c_in / groups, *kernel] is applied at every position of the output, a transposed one's of the input."""
    x, weight = call.value(0), call.value(1)
    is_transposed = "transpose" in call._op.target or call.argument(6, "transposed") is True
    spatial = len(weight.shape) - 2
    where = (x if is_transposed else call.output()).shape
    batch = x.shape[0] if len(x.shape) == spatial + 2 else 1
    return _product(2 * batch * math.prod(where[-spatial:]) * weight.numel, x, weight)


def _attention(call: _Call) -> _Flops:
    """softmax(q kᵀ) v with q [.., h, s, d], k [.., h_kv, t, d], v [.., h_kv, t, e]; causal counts in full.

    With dropout, or a mask that learns, no fused kernel applies and the four products of the written-out form run backward.
    """
    q, k, v = call.value(0, "query"), call.value(1, "key"), call.value(2, "value")
    positions = math.prod(q.shape[:-1]) * k.shape[-2]
    scores, weighted = 2 * positions * q.shape[-1], 2 * positions * v.shape[-1]
    mask, dropout = call.argument(3, "attn_mask"), call.argument(4, "dropout_p", 0.0)
    if dropout or (isinstance(mask, Ref) and call.resolve(mask).requires_grad):
        backward = scores * (q.requires_grad + k.requires_grad)
        needs_scores = q.requires_grad or k.requires_grad or isinstance(mask, Ref)
        return _Flops(scores + weighted, backward + weighted * (needs_scores + v.requires_grad))
    return _Flops(scores + weighted, 3 * scores + 2 * weighted)


def _recurrent(call: _Call) -> _Flops:
    """Every weight matrix is applied once a step; the state before the first step seldom requires a gradient."""
    x, weights = call.value(0), [call.resolve(item) for item in _weights(call)]
    num_steps, batch = _steps_and_batch(x, call)
    states = call.argument(1)
    state = call.resolve(states[0] if isinstance(states, tuple) else states)
    forward = backward = 0
    matrices = [weight for weight in weights if len(weight.shape) == 2]
    num_layers_ways = state.shape[0]
    per_cell = len(matrices) // num_layers_ways  # input, hidden and perhaps projection
    first_layer = num_layers_ways // _layers(call)
    for index, weight in enumerate(matrices):
        flops = 2 * num_steps * batch * weight.numel
        cell, role = divmod(index, per_cell)
        backward += flops * weight.requires_grad
        if role == 1:  # the hidden state of all steps but the one given
            backward += flops if state.requires_grad else flops * (num_steps - 1) // num_steps
        elif role > 1 or cell >= first_layer or x.requires_grad:
            backward += flops
        forward += flops
    return _Flops(forward, backward)


def _weights(call: _Call) -> tuple[Any, ...]:
    weights: tuple[Any, ...] = call.argument(2)
    return weights


def _layers(call: _Call) -> int:
    return int(call.argument(4))


def _steps_and_batch(x: Value, call: _Call) -> tuple[int, int]:
    """x is [steps, batch, features], or [batch, steps, features] if batch_first."""
    if call.argument(8) is True:
        return x.shape[1], x.shape[0]
    return x.shape[0], x.shape[1]


_FORMULAS: Final[Mapping[str, Callable[[_Call], _Flops]]] = {
    "aten.linear": _linear,
    "aten.mm": _matrix_product(0),
    "aten.bmm": _matrix_product(0),
    "aten.addmm": _matrix_product(1),
    "aten.baddbmm": _matrix_product(1),
    "aten.matmul": _matmul,
    "aten.einsum": _einsum,
    **dict.fromkeys(("aten._grouped_mm", "transformers.grouped_mm_fallback"), _grouped),
    **{
        f"aten.{name}": _convolution
        for name in (
            *("conv1d", "conv2d", "conv3d", "convolution", "_convolution"),
            *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
        )
    },
    "aten.scaled_dot_product_attention": _attention,
    "shardstage.attention": _attention,
    **{f"aten.{name}": _recurrent for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")},
}
