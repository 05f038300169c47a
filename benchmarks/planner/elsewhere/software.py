"""What the software of these runs did, as far as it can be read in its code and configuration; no number is fitted to a run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from frameworks import MEGATRON_2021, MEGATRON_LOSS_BYTES, MEGATRON_VOCAB_MULTIPLE, Framework
from models import Kernels

from shardstage.cost import Execution

__all__ = ["layers_of", "software_of"]

FSDP = Execution(accumulation_bytes=0.0, wire_bytes=4.0)
"""mixed_precision_reduce is float32 (torchtitan, config_manager.py), as what Lightning's FSDPStrategy reduces at bf16-mixed."""

TORCHTITAN = Framework(
    kernels=Kernels(attention="flash", norm="eager-rms", is_rotary=True, has_bias=False),
    is_compiled=False,
    execution=FSDP,
)
"""model.norm_type of its configurations is rmsnorm since pull request 297 (May 2024), written out; they are not compiled."""

MEGATRON_CORE = Execution(
    accumulation_bytes=8.0,  # gradient_accumulation_fusion: the product reads and writes the float32 sum
    wire_bytes=4.0,
    overlaps_gradients=True,  # overlap_grad_sync
    overlaps_sends=True,  # overlap_p2p_comm, batch_p2p_comm: False
    sums_ties_whole=True,  # core/distributed/finalize_model_grads.py
)
"""github.com/NVIDIA/NeMo-Framework-Launcher launcher_scripts/conf/training: nemotron, llama and gpt3 configurations. What attention is
computed with: NVTE_FUSED_ATTN (cuDNN) is 1 for Nemotron 4 15B and Llama 3.1, 0 for Nemotron 4 340B and GPT-3 (github.com/NVIDIA/dgxc-
benchmarking nemotron, llama3.1, nemo_megatron and grok1/configure.sh @35a9aecc and @143b90dd)."""

NEMO = Framework(
    kernels=Kernels(attention="cudnn", norm="rms", is_rotary=True, has_bias=False),
    is_compiled=True,  # bias_activation_fusion, apply_rope_fusion, persist_layer_norm
    execution=MEGATRON_CORE,
    loss_bytes=MEGATRON_LOSS_BYTES,
    vocab_multiple=MEGATRON_VOCAB_MULTIPLE,
    overlaps_tp=True,  # ub_tp_comm_overlap
)

NANOTRON = Framework(
    kernels=Kernels(attention="flash", norm="rms", is_rotary=True, has_bias=False),
    is_compiled=False,
    execution=Execution(
        accumulation_bytes=10.0,  # accumulate_grad_in_fp32: bfloat16 gradients into float32 sums
        wire_bytes=4.0,
        overlaps_sends=False,  # 1F1B: P2P.recv_tensors and send_tensors wait
        sums_ties_whole=True,
        sums_whole=True,  # optim/gradient_accumulator.py, get_fp32_accum_hook
    ),
    loss_bytes=MEGATRON_LOSS_BYTES,  # parallel/tensor_parallel/functional.py, sharded_cross_entropy
    bucket_bytes=25 * 2**20,  # ddp_bucket_cap_mb
)
"""github.com/huggingface/nanotron, src/nanotron."""


GPT = Kernels(attention="fused-softmax", dropout=0.1)
MEGATRON_2022 = replace(
    NEMO, kernels=GPT, execution=MEGATRON_2021, overlaps_tp=False, overlaps_tp_backward=True
)
"""Since January 2022 an input's gradient is summed beside the product for the weight's (github.com/NVIDIA/Megatron-LM
megatron/mpu/layers.py, async_tensor_model_parallel_allreduce), with sequence parallelism scattered (Korthikanti et al. 2022, §4.2.2)."""

FMS = Framework(
    kernels=Kernels(attention="flash", norm="eager-rms", is_rotary=True, has_bias=False),
    is_compiled=False,
    execution=Execution(accumulation_bytes=0.0, wire_bytes=2.0),
)
"""github.com/foundation-model-stack/fms-fsdp fms_fsdp/policies/mixed_precision.py: bfSixteen reduces gradients in bfloat16."""

LITGPT = Framework(
    kernels=Kernels(attention="flash", norm="eager-rms", is_rotary=True, has_bias=False),
    is_compiled=False,
    execution=Execution(accumulation_bytes=0.0, wire_bytes=2.0, update_bytes=14.0),
)
"""All in bfloat16: AdamW reads and writes weights and moments and reads gradients, 2 bytes each."""

GPT2 = Framework(
    kernels=Kernels(attention="flash"), is_compiled=True, execution=Execution(accumulation_bytes=0.0)
)


def software_of(name: str, plan: dict[str, Any]) -> Framework:
    """What ran; ``is_compiled`` of a plan: each layer by torch.compile."""
    if name in ("torchtitan", "litgpt"):
        found = TORCHTITAN if name == "torchtitan" else LITGPT
        return replace(found, is_compiled=bool(plan.get("is_compiled")))
    return {
        "megatron-2022": MEGATRON_2022,
        "nemo-2023": replace(NEMO, kernels=GPT, overlaps_tp=False),
        "fms": FMS,
        "gpt2": replace(GPT2, products_ratio=252.9 / 271.2),
        "tinyllama": replace(
            TORCHTITAN, kernels=NANOTRON.kernels, is_compiled=True
        ),  # fused rotary, swiglu and norm
        "llama3": replace(NEMO, kernels=NANOTRON.kernels, vocab_multiple=1, overlaps_tp=False),
        "nemo": NEMO,
        "nemo-flash": replace(NEMO, kernels=NANOTRON.kernels),
        "nemo-moe": replace(NEMO, kernels=NANOTRON.kernels, execution=replace(MEGATRON_CORE, wire_bytes=2.0)),
        "nemo-gpt": replace(
            NEMO,
            kernels=Kernels(attention="flash", dropout=0.1),
            execution=replace(MEGATRON_CORE, wire_bytes=2.0),  # grad_sync_dtype: bf16
        ),
        "nanotron": NANOTRON,
    }[name]


def layers_of(name: str, model: dict[str, Any], pp: int) -> tuple[int, ...]:
    """Layers of each stage where the software cuts by FLOPs: nanotron gives a stage what begins before its share of them ends, the head
    among it (models/base.py, build_model). Empty: as many on each."""
    if name != "nanotron" or pp == 1:
        return ()
    hidden = model["hidden"]
    costs = [4 * hidden * hidden + 3 * model["ffn_hidden"] * hidden] * model["layers"]
    costs.append(model["vocab"] * hidden)
    stages, stage, done = [0] * pp, 0, 0
    for number, cost in enumerate(costs):
        stages[stage] += number < model["layers"]
        done += cost
        stage += done > sum(costs) * (stage + 1) / pp
    return tuple(stages)
