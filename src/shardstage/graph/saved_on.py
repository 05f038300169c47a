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
    attention            q, k, v, mask, result, a float32 a row;  flash or cuDNN: the same, and 16 bytes of random state; heads padded to
                         written out where heads are unlike       multiples of 8. efficient: the same, rows padded to multiples of 32.
                                                                  written out: q and k scaled, v, probabilities [.., s, t], all in
                                                                  float32, of keys and values a copy for each query head;
                                                                  which of these: by compute capability, too (``attention_kernel``)

Read from ``derivatives.yaml`` and ``native_functions.yaml`` of torch (``torchgen/packaged``), ``ATen/native/layer_norm.cpp`` and
``ATen/native/transformers/cuda/sdp_utils.cpp``: ``rms_norm`` calls ``_fused_rms_norm``, which has a kernel for CUDA and is composed of its
parts on a CPU (on either for images in channels-last order, which a graph does not tell). Which kernel attention takes depends on the
device: ``attention_kernel``. Told apart here is only what differs by tensors of the input's size or more: ``rms_norm`` and attention
that one of the two devices writes out. The rest is a few bytes a row. oneDNN's LSTM workspace (``saved_trace``) stands for cuDNN's,
too, whose size torch does not tell.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final, Literal

from shardstage.graph.attention import ATTENTION, attention_operands, draws_attention, kept_scores
from shardstage.graph.model_graph import ModelGraph, Op, Value

__all__ = ["attention_kernel", "is_fused", "saved_on"]

AttentionKernel = Literal["flash", "efficient", "written out"]

HEAD_ALIGNMENT: Final = {"float16": 8, "bfloat16": 8, "float32": 4}
"""Features of a head of which the efficient kernel wants multiples: 128 bits (``minimum_gemm_alignment``)."""

OLD_HEAD_ALIGNMENT: Final = {"float16": 8, "float32": 1}
"""The same before compute capability 8.0, where it takes no bfloat16 (``less_than_sm80_mem_efficient_dtypes``)."""

FLASH_CAPABILITY: Final = 8.0
"""From which on the flash kernel runs (``check_flash_attention_hardware_support``)."""

MAX_FLASH_FEATURES: Final = 256
"""Of a head (``check_head_dim_size_flash``)."""


def saved_on(graph: ModelGraph, device_kind: str, capability: float | None = None) -> ModelGraph:
    """The graph, whole or of a rank or stage, with ``Op.saved`` as on devices of this kind; the very graph where nothing differs.

    ``capability`` is CUDA's compute capability (None: 8.0 or more).
    """
    if device_kind != "cuda":
        return graph
    kept = {op.name: found for op in graph.ops if op.saved and (found := _kept(graph, op, capability))}
    if not kept:
        return graph
    values = dict(graph.values)
    for op in graph.ops:
        if op.name in kept:
            for name in (name for name in op.saved if graph.values[name].kind == "saved"):
                del values[name]
            values.update({each.name: each for each in kept[op.name] if each.kind == "saved"})
    ops = tuple(
        replace(op, saved=tuple(each.name for each in kept[op.name])) if op.name in kept else op
        for op in graph.ops
    )
    values.update(_views_of_attention(ops, values, kept))
    return replace(graph, ops=ops, values=values)


def is_fused(x_dtype: str, weight_dtype: str) -> bool:
    """Whether CUDA's kernel takes x [.., h] with its weight [h]: not where their dtypes differ or are complex."""
    return x_dtype == weight_dtype and not x_dtype.startswith("complex")


def attention_kernel(
    query: Sequence[int],
    key: Sequence[int],
    value: Sequence[int],
    dtype: str,
    *,
    has_mask: bool,
    capability: float | None = None,
) -> AttentionKernel:
    """Which kernel CUDA takes for attention of these shapes [.., heads, tokens, features].

    Flash takes 16 bits, grouped queries too, equally many features of all and no mask; the efficient kernel heads one by one, float32 and
    values of other features, too, if features are aligned; what neither takes is written out (``sdp_utils.cpp``). Before compute
    capability 8.0 there is no flash kernel, and none for bfloat16.
    """
    if len(query) != 4:
        return "written out"
    is_old = capability is not None and capability < FLASH_CAPABILITY
    is_short = dtype in ("float16", "bfloat16") and not is_old
    if is_short and not has_mask and query[-1] == key[-1] == value[-1] <= MAX_FLASH_FEATURES:
        return "flash"
    alignment = (OLD_HEAD_ALIGNMENT if is_old else HEAD_ALIGNMENT).get(dtype)
    is_aligned = alignment is not None and query[-1] % alignment == 0 == value[-1] % alignment
    has_like_heads = len({tuple(each[:-2]) for each in (query, key, value)}) == 1
    is_taken = has_like_heads and query[-1] == key[-1] and is_aligned
    return "efficient" if is_taken else "written out"


def _kept(graph: ModelGraph, op: Op, capability: float | None) -> tuple[Value, ...]:
    """What CUDA keeps of an op; nothing where that is what a CPU keeps."""
    if op.target == "aten.rms_norm.default" and _has_kernel(graph, op):
        return (*(graph.values[name] for name in op.inputs), _statistics(graph, op))
    if op.target == ATTENTION:
        return _kept_of_attention(graph, op, capability)
    return ()


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


def _kept_of_attention(graph: ModelGraph, op: Op, capability: float | None) -> tuple[Value, ...]:
    """What CUDA keeps where only one of it and a CPU, whose kernel wants equally many features, writes attention out; else nothing."""
    *names, mask = attention_operands(op)
    query, key, value = (graph.values[name] for name in names)
    bias = graph.values[mask] if mask is not None else None
    if draws_attention(op) or (bias is not None and bias.requires_grad):
        return ()
    shapes = (query.shape, key.shape, value.shape)
    kernel = attention_kernel(*shapes, query.dtype, has_mask=bias is not None, capability=capability)
    if (kernel == "written out") == bool(kept_scores(graph, op)):
        return ()
    if kernel == "written out":
        return _written_out(op, query, key, value)
    if bias is not None and bias.dtype == "bool":
        bias = replace(bias, name=f"{op.name}#bias", dtype=query.dtype, kind="saved", alias_of="")
    rows = Value(name=f"{op.name}#logsumexp", shape=query.shape[:-1], dtype="float32", kind="saved")
    result = next(graph.values[name] for name in op.outputs if name is not None)
    return (query, key, value, *([] if bias is None else [bias]), result, rows)


def _written_out(op: Op, query: Value, key: Value, value: Value) -> tuple[Value, ...]:
    """Queries and keys with their share of the scale, probabilities and values, for each query head."""
    heads, tokens = query.shape[:-2], key.shape[-2]
    wide = query.dtype if query.dtype == "float64" else "float32"
    shapes = {
        "query": query.shape,
        "key": (*heads, *key.shape[-2:]),
        "probabilities": (*heads, query.shape[-2], tokens),
        "value": (*heads, *value.shape[-2:]),
    }
    made = {
        name: Value(name=f"{op.name}#{name}", shape=shape, dtype=wide, kind="saved")
        for name, shape in shapes.items()
    }
    if value.shape == made["value"].shape and value.dtype == wide:
        made["value"] = value
    return tuple(made.values())


def _views_of_attention(
    ops: Sequence[Op], values: Mapping[str, Value], kept: Mapping[str, object]
) -> Iterator[tuple[str, Value]]:
    """The results of such attention [b, h, s, e] as [b, s, h, e] or flatter: a copy on a CPU, a view on CUDA, whose kernel writes heads
    side by side."""
    as_written: set[str | None] = set()
    turned: set[str | None] = set()
    for op in (op for op in ops if op.inputs):
        given = op.inputs[0]
        if op.target == ATTENTION and op.name in kept:
            as_written.update(name for name in op.outputs if name in op.saved)
        elif given in as_written and op.target == "aten.reshape.default":
            as_written.update(out for out in op.outputs if out and values[out].shape == values[given].shape)
        elif (
            given in as_written and op.target == "aten.transpose.int" and {*op.args[1:]} in ({1, 2}, {-2, -3})
        ):
            turned.update(op.outputs)
        elif given in turned and op.target in _RESHAPING:
            turned.update(op.outputs)
            yield from ((out, replace(values[out], alias_of=given)) for out in op.outputs if out)


_RESHAPING: Final = frozenset({"aten.contiguous.default", "aten.flatten.using_ints", "aten.reshape.default"})
