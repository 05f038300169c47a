"""What the software of published runs did: which kernels ran, and the step around them.

Each field is a fact that can be read in a framework's code or documents, or was measured elsewhere, never a number fitted to its times.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from models import Kernels

from shardstage.cost import Execution

__all__ = ["DEEPSPEED_MEGATRON", "LOSS_BYTES", "MEGATRON_LOSS_BYTES", "Framework", "framework_of"]


@dataclass(frozen=True, kw_only=True)
class Framework:
    """What a group's software did: kernels, whether pointwise chains were compiled, and the step around them.

    ``loss_bytes`` are moved forward for each logit beyond what a cross-entropy of float32 logits moves. Where a framework
    ``gathers_logits``, each tensor-parallel rank computes the whole vocabulary's loss; ``num_gates`` are the column-parallel products of
    an MLP that sum their input's gradient on their own, beyond the first. A vocabulary is padded to a multiple of ``vocab_multiple`` on
    each tensor-parallel rank. ``waits_for_kernels``: it ran with CUDA_LAUNCH_BLOCKING. ``dispatch_s`` is what its host takes for
    a kernel, where another than the preset's was measured. ``products_ratio``: what its library reached of today's rate of products.
    ``overlaps_tp``: what travels along tensor parallelism does so beside the products, ``overlaps_tp_backward``: in the backward alone,
    beside those for weights' gradients.
    """

    kernels: Kernels
    is_compiled: bool
    execution: Execution
    loss_bytes: float = 0.0
    gathers_logits: bool = False
    num_gates: int = 0
    bucket_bytes: int = 200 * 2**20
    vocab_multiple: int = 1
    waits_for_kernels: bool = False
    dispatch_s: float | None = None
    products_ratio: float = 1.0
    overlaps_tp: bool = False
    overlaps_tp_backward: bool = False


MEGATRON_2021 = Execution(
    accumulation_bytes=6.0,  # param.grad += grad in fp16: no contiguous fp32 buffer yet
    wire_bytes=2.0,
    overlaps_gradients=False,  # DDP "local": all_reduce after the last microbatch
    overlaps_sends=False,  # send_forward_recv_backward waits
    scatters_sends=True,  # SC21 §4.1, scatter/gather optimisation
    sums_ties_whole=True,  # allreduce of the shared embedding's gradient; DeepSpeed: pipe/module.py, allreduce_tied_weight_gradients
)
MEGATRON_LOSS_BYTES = 24.0
"""core/tensor_parallel/cross_entropy.py: maximum (4), subtraction (8), exponentials (8), their sum (4), division (8), where one kernel
reads float32 logits and writes their logarithms (8)."""

LOSS_BYTES = 14.0
"""Moved each way for a logit by the cast to float32 and the cross-entropy of that."""

DEEPSPEED_MEGATRON = MEGATRON_2021
"""Its pipeline sends parts, too: is_pipe_partitioned and is_grad_partitioned (github.com/deepspeedai/DeepSpeed runtime/pipe/engine.py)."""

DEEPSPEED_BF16 = replace(
    DEEPSPEED_MEGATRON, accumulation_bytes=10.0, wire_bytes=4.0, sums_whole=True, packing_bytes=16.0
)
"""Gradients in bfloat16 are added to sums in float32 (the same repository, runtime/bf16_optimizer.py), which are flattened, all-reduced
whole and copied back (_bf16_reduce_grads in runtime/pipe/engine.py, buffered_allreduce_fallback in runtime/engine.py)."""

MEGATRON_VOCAB_MULTIPLE = 128
"""--make-vocab-size-divisible-by, times the tensor-parallel ranks (github.com/NVIDIA/Megatron-LM megatron/tokenizer/tokenizer.py)."""

HANGING_RANKS = 320
"""So many A100 of Jean Zay "always hang" unless CUDA_LAUNCH_BLOCKING=1, which 160 do not need and BLOOM's script sets
(github.com/bigscience-workshop/bigscience train/tr11-176B-ml, chronicles-prequel.md and tr11-176B-ml.slurm)."""

DEEPSPEED_DISPATCH_S = 60e-6
"""Fitted on the even half of vTrain's models, which Megatron-DeepSpeed ran on other machines (benchmarks/planner/vtrain)."""

FSDP = Execution(accumulation_bytes=0.0, wire_bytes=4.0)
FSDP_BF16 = replace(FSDP, wire_bytes=2.0)
"""Gradients are reduced as they are computed: mixed precision PURE of Mosaic's trainer (github.com/mosaicml/composer
composer/distributed/mosaic_parallelism.py), bfSixteen of IBM's (github.com/foundation-model-stack/fms-fsdp policies/mixed_precision.py)."""

INTERNEVO = Execution(
    accumulation_bytes=6.0,
    wire_bytes=2.0,
    overlaps_sends=False,
    sums_whole=True,  # _reduce_and_copy: no destination, so an all_reduce of the bucket
    packing_bytes=8.0,  # bucket.flatten and unflatten_and_copy
    broadcasts_parameters=True,  # broadcast_params: rank by rank
)
"""github.com/InternLM/InternEvo internlm/solver/optimizer/hybrid_zero_optim.py."""

INTERNEVO_LOSS_BYTES = 36.0
"""internlm/model/metrics.py, for each microbatch: a second cross-entropy (4), the maximum twice (8), argmax (4), less the maximum (8),
exponentials (8), their sum (4), of float32 logits."""

DEEPSPEED_ZERO3_2021 = Execution(accumulation_bytes=0.0, wire_bytes=2.0, gathers_apart=4, live_elements=1e9)
"""A decoder layer's four matrices; what is smaller than 100,000 elements stays whole, and max_live_parameters is 1e9
(github.com/deepspeedai/DeepSpeed v0.3.13, runtime/zero: _allgather_param and _reduce_scatter_gradient in partition_parameters.py,
fetch_sub_module in stage3.py). torch's ProcessGroupNCCL copies what each rank sent in a kernel of its own."""

H100_PRODUCTS_OF_2023 = 0.774 / 0.955
"""cuBLAS for Hopper was young: bfloat16 products of a Llama 70B on an H100 with the PyTorch of August and September 2023 (rows of
16,384; 8192 x 1280: 604 and 622 us, 1024 x 8192: 500 and 499, 8192 x 7168: 3,570 and 3,445, 3584 x 8192: 1,590 and 1,628;
github.com/meta-pytorch/float8_experimental, pull requests 38 and 100) ran at 0.774 (median) of the preset's rate before its sustained
ratio. Today's, 789 TFLOP/s at 4096 cubed and 798 at 8192 cubed (torch 2.7, github.com/zzc0721/torch-performance-test-data issue 79),
reach it."""

ALEPH_ALPHA = replace(MEGATRON_2021, scatters_sends=False, wire_bytes=4.0)
"""Gradients are added up in bfloat16 and reduced in float32 (github.com/Aleph-Alpha/scaling core/optimizer/allreduce.py)."""


def framework_of(row: dict[str, Any]) -> Framework:
    group, plan = row["group"], row["plan"]
    gated = row["model"]["mlp_mats"] == 3
    if group.startswith("megatron"):
        return Framework(
            kernels=Kernels(attention="fused-softmax", dropout=0.1),
            is_compiled=True,
            execution=DEEPSPEED_ZERO3_2021 if plan["zero"] == 3 else MEGATRON_2021,
            loss_bytes=MEGATRON_LOSS_BYTES,
            vocab_multiple=MEGATRON_VOCAB_MULTIPLE,
        )
    if group == "zero-bubble":
        return Framework(
            kernels=Kernels(attention="fused-softmax", dropout=0.1),
            is_compiled=True,
            execution=MEGATRON_2021,
            loss_bytes=MEGATRON_LOSS_BYTES,
            vocab_multiple=MEGATRON_VOCAB_MULTIPLE,
        )
    if group.startswith("bloom"):
        return Framework(
            kernels=Kernels(attention="fused-softmax", dropout=0.1),
            is_compiled=True,
            execution=DEEPSPEED_BF16 if plan["dtype"].startswith("bf16") else DEEPSPEED_MEGATRON,
            loss_bytes=MEGATRON_LOSS_BYTES,
            vocab_multiple=MEGATRON_VOCAB_MULTIPLE,
            waits_for_kernels=row["hardware"]["gpus"] >= HANGING_RANKS,
            dispatch_s=DEEPSPEED_DISPATCH_S,
        )
    if group == "hagemann-2023":
        kernel = plan["attention_kernel"]
        return Framework(
            kernels=Kernels(
                attention=_HAGEMANN_ATTENTION[kernel.split(" ")[0]],
                norm="rms" if "RMS" in kernel else "eager-rms",
                is_rotary=True,
                has_bias=False,
            ),
            is_compiled=False,
            execution=ALEPH_ALPHA,
            gathers_logits=True,  # transformer/model/layers/lm_head.py: parallel_output=False
            num_gates=1,  # core/nn/mlp.py: dense_in and siglu_weight
        )
    return Framework(
        kernels=Kernels(
            attention="flash-triton" if group == "mosaic-llm-foundry" else "flash",
            norm="rms" if gated else "layer",
            is_rotary=gated,
            has_bias=False,
        ),
        is_compiled=bool(plan.get("compile")),
        execution=_execution_of(group, plan),
        loss_bytes=INTERNEVO_LOSS_BYTES if group == "internevo" else 0.0,
        bucket_bytes=2 * 512 * 2**20 if group == "internevo" else 200 * 2**20,
        products_ratio=H100_PRODUCTS_OF_2023 if row["hardware"]["gpu"] == "H100-80GB" else 1.0,
    )


def _execution_of(group: str, plan: dict[str, Any]) -> Execution:
    if group == "internevo":
        return INTERNEVO
    is_pure = plan.get("mp_mode") == "PURE" or group == "ibm-fms-fsdp"
    return FSDP_BF16 if is_pure else FSDP


_HAGEMANN_ATTENTION: dict[str, Any] = {
    "torch": "written-out",
    "fused": "fused-softmax",
    "flash_attentionv1.0.8": "flash-1",
    "flash_attention2": "flash",
}
