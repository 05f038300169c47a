"""Zero Bubble (Qi et al. 2023, tables 3 and 4): the largest peak of all stages, in whole GB."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

from cases import Case
from models import Kernels
from published import shape_of
from schedules import zb_2p

from shardstage.cost.accounting import Accounting, LossBytes
from shardstage.layout import Mesh
from shardstage.schedule import Schedule, make_schedule

__all__ = ["FP16_MEGATRON", "case_of"]

FP16_MEGATRON = Accounting(
    gradient_bytes=2,  # Megatron-LM arguments.py 2023: --fp16 keeps main gradients in fp16 unless told to accumulate in fp32
    copies_reduced_part=False,
    num_posted_receives=1,  # p2p_communication.py: one receive buffer each way, waited for at once
    has_own_receives=False,  # the received tensor is the first layer's saved input
    update_bytes=4.0,  # Float16Optimizer copies gradients to fp32 before the step
)


def _loss(num_tokens: int, hidden: int, vocab: int) -> LossBytes:
    """Megatron's cross_entropy.py of 2023: logits in fp16, a copy in fp32, the difference from the largest, which becomes the saved softmax.

    Kept besides: the norm's input and output.
    """
    num_logits = num_tokens * vocab
    return LossBytes(kept_bytes=4 * num_logits + 4 * num_tokens * hidden, transient_bytes=6 * num_logits)


def case_of(row: dict[str, Any]) -> Case:
    model, plan = row["model"], row["plan"]
    pp, vpp, name = plan["pp"], plan["vpp"], plan["schedule"]
    each = (model["layers"] + 2) // (pp * vpp)
    m = plan["num_microbatches"]
    return Case(
        shape=shape_of(model),
        kernels=Kernels(attention="fused-softmax", dropout=0.1),
        accounting=replace(
            FP16_MEGATRON,
            loss=_loss(plan["microbatch"] * model["seq_len"], model["hidden"], model["vocab"]),
        ),
        mesh=Mesh(pp=pp),
        layers_of=(each - 1, *(each for _ in range(pp * vpp - 2)), each - 1),
        sequence=model["seq_len"],
        microbatch=plan["microbatch"],
        num_microbatches=m,
        zero=0,
        recompute="none",
        schedule=name,
        custom=_order(name, pp, vpp, m),
        precision="float16",
    )


@cache
def _order(name: str, pp: int, vpp: int, m: int) -> Schedule | None:
    if name == "1f1b":
        return None
    if name == "zb-2p":
        return zb_2p(pp, m)
    known = {"zb-1p": "zb-h1"}.get(name, name)
    return make_schedule(known, num_stages=pp * vpp, num_ranks=pp, num_microbatches=m)
