"""What Megatron-LM stores, each figure with the line of its code that says so."""

from __future__ import annotations

from models import Shape

from shardstage.cost.accounting import Accounting, LossBytes

__all__ = ["loss_2023", "loss_core", "megatron_2023", "megatron_core", "padded_vocab"]

WORKSPACE_BYTES = 32 * 2**20
"""CUBLAS_WORKSPACE_CONFIG=:4096:8, which --deterministic-mode asks for; also Transformer Engine's own workspace on sm80."""


def padded_vocab(num_tokens: int, tp: int) -> int:
    """tokenizer.py: rounded up to a multiple of --make-vocab-size-divisible-by (128) times tp."""
    step = 128 * tp
    return -(-num_tokens // step) * step


def loss_2023(num_tokens: int, hidden: int, vocab: int) -> LossBytes:
    """cross_entropy.py of 2023: logits in half precision, a copy in fp32, and their difference from the largest, the saved softmax.

    Kept besides: input and output of the last norm.
    """
    num_logits = num_tokens * vocab
    return LossBytes(kept_bytes=4 * num_logits + 4 * num_tokens * hidden, transient_bytes=6 * num_logits)


def loss_core(num_tokens: int, hidden: int, vocab: int) -> LossBytes:
    """core/tensor_parallel/cross_entropy.py since 2024: the copy in fp32 itself becomes the softmax (subtracted and exp'd in place)."""
    num_logits = num_tokens * vocab
    return LossBytes(kept_bytes=4 * num_logits + 4 * num_tokens * hidden, transient_bytes=2 * num_logits)


def megatron_2023(shape: Shape, *, num_tokens: int, tp: int, is_fp16: bool) -> Accounting:
    """Megatron-LM 2023 with or without --use-distributed-optimizer."""
    return Accounting(
        gradient_bytes=2 if is_fp16 else 4,  # arguments.py: --bf16 sets --accumulate-allreduce-grads-in-fp32
        copies_reduced_part=False,  # distrib_optimizer.py: parts are views of the gradient and parameter buffers
        num_posted_receives=1,  # p2p_communication.py: one buffer each way, waited for at once
        has_own_receives=False,  # what came is what the first layer's norm saves
        update_bytes=4.0 if is_fp16 else 0.0,  # optimizer.py: fp32 copies of fp16 gradients
        loss=loss_2023(num_tokens, shape.hidden, shape.vocab // tp),
    )


def megatron_core(
    shape: Shape, *, num_tokens: int, tp: int, is_fp16: bool, num_scores: int, keeps_scores_buffer: bool
) -> Accounting:
    """Megatron-Core 2024-25 as its CI runs it. ``num_scores``: of one rank's layer; none with fused attention.

    ``keeps_scores_buffer``: without Transformer Engine, scores are written over a buffer that stays (dot_product_attention.py,
    get_global_memory_buffer). With it, the batch's mask [b, 1, s, s] of booleans stays.
    """
    workspaces = 2 * WORKSPACE_BYTES
    return Accounting(
        gradient_bytes=2 if is_fp16 else 4,
        copies_reduced_part=False,
        num_posted_receives=2,  # the last microbatch's input and the gradient that left live until they are overwritten
        has_own_receives=False,
        update_bytes=4.0 if is_fp16 else 0.0,
        loss=loss_core(num_tokens, shape.hidden, shape.vocab // tp),
        fixed_bytes=workspaces + (2 * num_scores if keeps_scores_buffer else 0),
    )
