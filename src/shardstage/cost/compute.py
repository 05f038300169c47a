"""How long an op takes on a device, forward and backward.

    time = max(flops / rate(flops), moved_bytes / bytes_per_s) + op_latency_s

the roofline (Williams, Waterman, Patterson, 2009) with the rate that one product of that size reaches, and the launch. The backward
of an op with FLOPs runs one product for each operand that requires a gradient; that of any other op moves its operands twice:
the gradient is read beside the saved input and written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from shardstage.cluster import DeviceClass
from shardstage.graph import ModelGraph, Op
from shardstage.graph.flops import backward_flops, forward_flops, moved_bytes

__all__ = ["RELATIVE", "OpTime", "op_time", "optimizer_s"]

BACKWARD_MOVES: Final = 2
"""Bytes of the backward of an op that is no product, over those of its forward: in + out become in + grad_out, then grad_in."""

OPTIMIZER_PASSES: Final = 9
"""AdamW (fused) reads and writes the weight and two moments and reads the gradient: 7; clipping reads the gradient for its norm and
scales it: 1 + 1."""

RELATIVE: Final = DeviceClass(
    name="any device",
    kind="any",
    memory_bytes=1,
    bytes_per_s=1.0,
    flops_per_s={"float64": 10.0, "float32": 10.0, "bfloat16": 10.0, "float16": 10.0},
    source="no device: gives relative times where only balance matters",
    flops_source="10 FLOPs a byte: between a CPU core (about 5) and a GPU (about 100 in bfloat16)",
)


class OpTime(NamedTuple):
    """Seconds of one op for one microbatch."""

    forward_s: float
    backward_s: float


def op_time(graph: ModelGraph, op: Op, device: DeviceClass) -> OpTime:
    """Seconds forward and backward; a view takes none."""
    moved = moved_bytes(graph, op)
    forward, backward = forward_flops(graph, op), backward_flops(graph, op)
    if not moved and not forward:
        return OpTime(0.0, 0.0)
    dtype = _product_dtype(graph, op) if forward else ""
    moved_s = moved / device.bytes_per_s
    forward_s = max(device.gemm_s(forward, dtype=dtype) if forward else 0.0, moved_s) + device.op_latency_s
    if not _has_gradient(graph, op):
        return OpTime(forward_s, 0.0)
    if not forward:
        return OpTime(forward_s, BACKWARD_MOVES * moved_s + device.op_latency_s)
    num_products = max(1, round(backward / forward))
    product_s = device.gemm_s(backward / num_products, dtype=dtype)
    return OpTime(forward_s, num_products * (max(product_s, moved_s) + device.op_latency_s))


def optimizer_s(num_elements: int, element_bytes: int, num_tensors: int, device: DeviceClass) -> float:
    """Seconds of a fused AdamW step with clipping over ``num_elements`` of ``element_bytes`` in ``num_tensors`` flat tensors."""
    moved_s = OPTIMIZER_PASSES * num_elements * element_bytes / device.bytes_per_s
    return moved_s + num_tensors * device.op_latency_s


def _has_gradient(graph: ModelGraph, op: Op) -> bool:
    return any(name is not None and graph.values[name].requires_grad for name in op.outputs)


def _product_dtype(graph: ModelGraph, op: Op) -> str:
    """The dtype that the product is computed in: that of its first floating operand."""
    return next(d for d in _dtypes(graph, op.inputs) if "float" in d)


def _dtypes(graph: ModelGraph, names: Sequence[str]) -> list[str]:
    return [graph.values[name].dtype for name in names]
