"""``saved_on``: what autograd keeps of a graph's ops on one kind of device; a graph is captured on a CPU and says what is kept there.

    op                   kept on a CPU                            kept on a CUDA device (torch 2.13)
    rms_norm             x and x / rms in float32, both whole;    x, weight, 1 / rms: a float32 number a row (_fused_rms_norm);
                         1 / rms: a float32 number a row          its parts where weight and x differ in dtype, or are complex
    layer_norm           x, weight, mean and 1 / deviation        the same; the two numbers a row in float32, not in x's dtype
    group_norm           the same of each group                   the same
    batch_norm           x, weight, a channel's two numbers       the same, and cuDNN's reserve: a bit for each number at most
    silu, gelu           x                                        the same
    softmax, log_softmax the result                               the same
    cross_entropy        log_softmax's result, the labels         the same
    embedding            indices                                  the same
    dropout              a mask in x's dtype                      a mask of bytes; ours (``shardstage.dropout``) keeps bytes on both
    attention, flash     q, k, v, result, a float32 a row         the same, and 16 bytes of random state; heads padded to multiples of 8
    attention, efficient -                                        the same, rows padded to multiples of 32; the mask where there is one
    attention, cuDNN     -                                        as flash

Read from ``derivatives.yaml`` and ``native_functions.yaml`` of torch (``torchgen/packaged``), and ``ATen/native/layer_norm.cpp``:
``rms_norm`` calls ``_fused_rms_norm``, which has a kernel for CUDA and is composed of its parts on a CPU (on either for images in
channels-last order, which a graph does not tell). Told apart here is only what differs by tensors of the input's size: ``rms_norm``.
The rest is a few bytes a row. oneDNN's LSTM workspace (``saved_trace``) stands for cuDNN's, too, whose size torch does not tell.
"""

from __future__ import annotations

from dataclasses import replace

from shardstage.graph.model_graph import ModelGraph, Op, Value

__all__ = ["is_fused", "saved_on"]


def saved_on(graph: ModelGraph, device_kind: str) -> ModelGraph:
    """The graph, whole or of a rank or stage, with ``Op.saved`` as on devices of this kind; the very graph where nothing differs."""
    if device_kind != "cuda":
        return graph
    norms = [
        op for op in graph.ops if op.saved and op.target == "aten.rms_norm.default" and _has_kernel(graph, op)
    ]
    if not norms:
        return graph
    values = dict(graph.values)
    for name in (name for op in norms for name in op.saved if graph.values[name].kind == "saved"):
        del values[name]
    statistics = {op.name: _statistics(graph, op) for op in norms}
    values.update({value.name: value for value in statistics.values()})
    ops = (
        replace(op, saved=(*op.inputs, statistics[op.name].name)) if op.name in statistics else op
        for op in graph.ops
    )
    return replace(graph, ops=tuple(ops), values=values)


def is_fused(x_dtype: str, weight_dtype: str) -> bool:
    """Whether CUDA's kernel takes x [.., h] with its weight [h]: not where their dtypes differ or are complex."""
    return x_dtype == weight_dtype and not x_dtype.startswith("complex")


def _has_kernel(graph: ModelGraph, op: Op) -> bool:
    x, weight = (graph.values[name].dtype for name in (op.inputs[0], op.inputs[-1]))
    return is_fused(x, weight)


def _statistics(graph: ModelGraph, op: Op) -> Value:
    """1 / rms of each row: x.shape with 1 for every dim that is normalised."""
    x, num_dims = graph.values[op.inputs[0]], len(op.args[1])
    return Value(
        name=f"{op.name}#reciprocal_rms",
        shape=(*x.shape[:-num_dims], *(1,) * num_dims),
        dtype="float64" if x.dtype == "float64" else "float32",
        kind="saved",
    )
