"""How long a kernel and an op take on a device.

    seconds = max(arithmetic, moved_bytes / bytes reached) + launch

the roofline (Williams, Waterman, Patterson, 2009). Arithmetic follows from a product's shape where the device has a model of its kernels
(``cluster.KernelModel``), else from its FLOPs by the device's curve.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import gcd
from typing import Any, Final, NamedTuple

import numpy as np

from shardstage.cluster import UNCALIBRATED, DeviceClass
from shardstage.cluster.kernel_model import ALIGNED_BYTES
from shardstage.cost.collective import is_communication
from shardstage.cost.fusion import fused
from shardstage.cost.kernels import Kernel, KernelReader
from shardstage.graph import ModelGraph, Op
from shardstage.units import dtype_bytes

__all__ = [
    "RELATIVE",
    "OpTime",
    "added_launch_s",
    "compiled_time",
    "dispatch_s",
    "gradient_sums_s",
    "kernel_s",
    "kernels_s",
    "launched_s",
    "moved_s",
    "op_time",
    "optimizer_s",
]

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
    """Seconds of one op for one microbatch; ``weight_s`` of the backward's yield gradients of weights and can be put off."""

    forward_s: float
    backward_s: float
    weight_s: float

    @property
    def both_s(self) -> float:
        return self.forward_s + self.backward_s


def op_time(
    graph: ModelGraph, op: Op, device: DeviceClass, factors: Mapping[str, float] = UNCALIBRATED
) -> OpTime:
    """Seconds forward and backward at the graph's own microbatch, by ``factors`` of causes; a view takes none."""
    return _time_of(KernelReader(graph, _is_never_fixed).kernels(op), graph, device, factors)


def compiled_time(
    graph: ModelGraph, ops: Sequence[Op], device: DeviceClass, factors: Mapping[str, float] = UNCALIBRATED
) -> OpTime:
    """The same of computing ops that are compiled together."""
    return _time_of(fused(graph, KernelReader(graph, _is_never_fixed), ops), graph, device, factors)


def _time_of(
    kernels: Sequence[Kernel], graph: ModelGraph, device: DeviceClass, factors: Mapping[str, float]
) -> OpTime:
    each = [(kernel, kernel_s(kernel, graph.microbatch, device, factors)) for kernel in kernels]
    return OpTime(
        forward_s=sum(seconds for kernel, seconds in each if not kernel.is_backward),
        backward_s=sum(seconds for kernel, seconds in each if kernel.is_backward),
        weight_s=sum(seconds for kernel, seconds in each if kernel.is_weight),
    )


def gradient_sums_s(
    graph: ModelGraph, device: DeviceClass, factors: Mapping[str, float] = UNCALIBRATED
) -> float:
    """Seconds of summing gradients that no computing op makes room for: of what a stage's graph receives, and of what is communicated."""
    reader = KernelReader(graph, _is_never_fixed)
    talked = (reader.gradient_sums(op.outputs) for op in graph.ops if is_communication(op))
    sums = (*reader.received_sums(), *(kernel for kernels in talked for kernel in kernels))
    return sum(kernel_s(kernel, graph.microbatch, device, factors) for kernel in sums)


def kernel_s(
    kernel: Kernel, microbatch: float, device: DeviceClass, factors: Mapping[str, float] = UNCALIBRATED
) -> float:
    """Seconds of one kernel for a microbatch of so many samples, its launch included, by ``factors`` of its causes."""
    own_s = _own_s(kernel, microbatch, device)
    return factors[kernel.cause] * own_s + factors["host"] * added_launch_s(device)


def _own_s(kernel: Kernel, microbatch: float, device: DeviceClass) -> float:
    """Without what launching adds."""
    moved = moved_s(kernel.moved_bytes(microbatch), device)
    launch_s = 0.0 if device.kernels is None else device.kernels.launch_s
    if kernel.kind == "moved":
        return moved + launch_s
    if device.kernels is None:
        arithmetic_s = _by_flops_s(kernel, microbatch, device)
    elif kernel.kind == "attention":
        model = device.kernels
        ratio = model.attention_backward_ratio if kernel.is_backward else model.attention_forward_ratio
        rate = device.rate(kernel.dtype) * ratio * model.sustained_ratio
        arithmetic_s = kernel.flops * microbatch / rate
    else:
        m, n, k, count = kernel.sizes(microbatch)
        row_bytes = gcd(n, k) * dtype_bytes(kernel.dtype)
        arithmetic_s = device.kernels.product_s(
            m, n, k, count, device.rate(kernel.dtype), row_bytes=row_bytes
        )
    return max(arithmetic_s, moved) + launch_s


def kernels_s(kernels: Sequence[Kernel], microbatches: Sequence[float], device: DeviceClass) -> Any:
    """``kernel_s`` of many kernels at many microbatches: [kernels, microbatches]."""
    model = device.kernels
    if model is None or not kernels:
        launch_s = added_launch_s(device)
        rows = [[_own_s(kernel, b, device) + launch_s for b in microbatches] for kernel in kernels]
        return np.array(rows).reshape(len(kernels), len(microbatches))
    b = np.array(microbatches)[None, :]
    moved = _column([k.fixed_bytes for k in kernels]) + b * _column([k.sample_bytes for k in kernels])
    seconds = moved / (device.bytes_per_s * model.moved_ratio)
    for i, kernel in enumerate(kernels):
        if kernel.kind == "attention":
            ratio = model.attention_backward_ratio if kernel.is_backward else model.attention_forward_ratio
            rate = device.rate(kernel.dtype) * ratio * model.sustained_ratio
            seconds[i] = np.maximum(seconds[i], kernel.flops * b[0] / rate)
    products = [i for i, kernel in enumerate(kernels) if kernel.kind == "product"]
    if products:
        of = [kernels[i] for i in products]
        m, n, k, count = (_scaled(of, dim, b) for dim in ("m", "n", "k", "count"))
        widths = _column([dtype_bytes(kernel.dtype) for kernel in of])
        is_aligned = np.gcd(n.astype(np.int64), k.astype(np.int64)) * widths % ALIGNED_BYTES == 0
        rates = _column([device.rate(kernel.dtype) for kernel in of])
        seconds[products] = np.maximum(seconds[products], model.products_s(m, n, k, count, rates, is_aligned))
    return seconds + model.launch_s


def _scaled(kernels: Sequence[Kernel], dim: str, b: Any) -> Any:
    """One size of all products at all microbatches, as ``Kernel.sizes`` has it."""
    sizes = _column([float(k.num_products if dim == "count" else getattr(k, dim)) for k in kernels])
    is_scaled = _column([k.scaled == dim for k in kernels])
    return np.where(is_scaled, np.maximum(1.0, np.round(sizes * b)), sizes)


def _column(values: Sequence[float]) -> Any:
    return np.array(values)[:, None]


def moved_s(num_bytes: float, device: DeviceClass) -> float:
    """Seconds of reading and writing so many bytes of the device's memory."""
    ratio = 1.0 if device.kernels is None else device.kernels.moved_ratio
    return num_bytes / (device.bytes_per_s * ratio)


def optimizer_s(num_elements: float, element_bytes: int, num_tensors: int, device: DeviceClass) -> float:
    """Seconds of a fused AdamW step with clipping over ``num_elements`` of ``element_bytes`` in ``num_tensors`` flat tensors."""
    launch_s = device.op_latency_s if device.kernels is None else device.kernels.launch_s
    return moved_s(OPTIMIZER_PASSES * num_elements * element_bytes, device) + num_tensors * launch_s


def _by_flops_s(kernel: Kernel, microbatch: float, device: DeviceClass) -> float:
    flops: float = kernel.flops * microbatch
    if kernel.kind == "product":
        m, n, k, count = kernel.sizes(microbatch)
        flops = 2.0 * m * n * k * count
    return device.gemm_s(flops, dtype=kernel.dtype)


def _is_never_fixed(_: str) -> bool:
    return False


def added_launch_s(device: DeviceClass) -> float:
    """Seconds that the host adds to each kernel; 0 where the device's kernel model has launches in a kernel's own time."""
    return device.op_latency_s if device.kernels is None else 0.0


def dispatch_s(device: DeviceClass) -> float:
    """Seconds of the host for launching one kernel from eager PyTorch."""
    return 0.0 if device.kernels is None else device.kernels.dispatch_s


def launched_s(kernels_s: Any, num_kernels: int, talk_s: Any, device: DeviceClass) -> Any:
    """Seconds of kernels that take ``kernels_s`` on the device, launched one by one while they run and while ranks talk for ``talk_s``.

    A host that is slower than its device holds it up; where it is not, or nothing is known of it, they take what they take.
    """
    return np.maximum(kernels_s, dispatch_s(device) * num_kernels - talk_s)
