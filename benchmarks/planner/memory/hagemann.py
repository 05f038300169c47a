"""Hagemann et al. 2023 (arXiv 2311.05610): which layouts of LLaMA 13B fit 80 GB, as Aleph Alpha's library `scaling` ran them.

Its code was published later (github.com/Aleph-Alpha/scaling); the lines named here are of that version.
"""

from __future__ import annotations

from typing import Any, Literal

from aleph_alpha import LocalShape
from allocation_trace import RankOfStage
from cases import Case
from models import Kernels
from published import shape_of

from shardstage.cost.accounting import Accounting, LossBytes
from shardstage.layout import Mesh

__all__ = ["case_of", "stage_of"]

REDUCED_AT_ONCE = 500_000_000
"""Elements of a bucket (optimizer/allreduce.py), flattened in bf16 and then copied to fp32."""

ITEMS_BESIDE_LAYERS = (1, 2)
"""Embedding before the layers, norm and head after them: items of pipe_partition_uniform like a layer."""


def case_of(row: dict[str, Any]) -> Case:
    model, plan = row["model"], row["plan"]
    shape, tp, pp, dp = shape_of(model), plan["tp"], plan["pp"], plan["dp"]
    kernel, microbatch = plan["attention_kernel"], plan["microbatch"]
    layers_of = _uniform(shape.layers, pp)
    return Case(
        shape=shape,
        kernels=Kernels(  # "torch": a softmax in fp32, which is an assumption
            attention="flash"
            if "flash" in kernel
            else "fused-softmax"
            if kernel == "fused"
            else "written-out",
            norm="rms" if "RMS" in kernel else "eager-rms",
            is_rotary=True,
            has_bias=False,
        ),
        accounting=_accounting(model, num_tokens=microbatch * model["seq_len"]),
        mesh=Mesh(dp=dp, tp=tp, pp=pp),
        layers_of=layers_of,
        sequence=model["seq_len"],
        microbatch=microbatch,
        num_microbatches=max(1, plan["global_batch"] // (microbatch * dp)),
        zero=1,
        recompute=plan["recompute"],
        schedule="1f1b",
        is_sequence_parallel=bool(plan["sp"]) and tp > 1,
    )


def _accounting(model: dict[str, Any], *, num_tokens: int) -> Accounting:
    """The head gathers its logits over tp (lm_head.py: no parallel_output), so each rank has the loss of the whole vocabulary.

    Bytes of a logit: 4 of its saved log-softmax, 2 of the head's result, which the pipeline's buffer keeps; in the backward 4 of the
    gradient of the log-softmax and 4 of that of the logits in fp32.
    """
    num_logits = num_tokens * model["vocab"]
    return Accounting(
        gradient_bytes=2,  # param.grad in bf16, accumulated by autograd
        copies_reduced_part=False,  # parameter_group.py: gathers into views of the flat parameters
        num_posted_receives=1,
        has_own_receives=False,
        keeps_sent=True,  # parallel_module.py: pipe_buffer holds a stage's output for its backward
        update_bytes=8.0,  # the part's gradient in fp32, and foreach AdamW's square root of the second moment
        bucket_bytes=6 * REDUCED_AT_ONCE,
        loss=LossBytes(
            kept_bytes=6 * num_logits + 4 * num_tokens * model["hidden"], transient_bytes=8 * num_logits
        ),
    )


def _uniform(num_layers: int, pp: int) -> tuple[int, ...]:
    """pipe_partition_uniform: equally many items a stage, one more for the first ones."""
    before, after = ITEMS_BESIDE_LAYERS
    items = num_layers + before + after
    sizes = [items // pp + (stage < items % pp) for stage in range(pp)]
    sizes[0] -= before
    sizes[-1] -= after
    return tuple(sizes)


def stage_of(row: dict[str, Any], case: Case, rank: int) -> RankOfStage:
    """What a rank runs, operator by operator."""
    tp, shape, kernel = case.mesh.tp, case.shape, row["plan"]["attention_kernel"]
    return RankOfStage(
        shape=LocalShape(
            hidden=shape.hidden,
            heads=shape.heads // tp,
            head_dim=shape.head_dim,
            ffn_hidden=shape.ffn_hidden // tp,
            vocab=shape.vocab,
            tp=tp,
            is_sequence_parallel=case.is_sequence_parallel,
            attention=_ATTENTION[kernel.split(" ")[0]],
            has_fused_norm="RMS" in kernel,
        ),
        num_layers=case.layers_of[rank],
        rank=rank,
        pp=case.mesh.pp,
        dp=case.mesh.dp,
        microbatch=case.microbatch,
        sequence=case.sequence,
        num_microbatches=case.num_microbatches,
        is_recomputed=case.recompute == "full",
    )


_ATTENTION: dict[str, Literal["torch", "fused", "flash-1", "flash-2"]] = {
    "torch": "torch",
    "fused": "fused",
    "flash_attentionv1.0.8": "flash-1",
    "flash_attention2": "flash-2",
}
