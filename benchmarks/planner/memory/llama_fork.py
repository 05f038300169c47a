"""LLaMA-2 7B in a fork of Megatron-LM (yxyOo, tools/get_training_info): torch's largest allocated bytes of a run, in GB of 2^30.

The README states neither rank nor GB or GiB; the tool that it documents divides by 2^30. The largest rank is compared.
"""

from __future__ import annotations

from typing import Any

from cases import Case
from megatron import megatron_2023
from models import Kernels
from published import shape_of

from shardstage.layout import Mesh

__all__ = ["case_of"]


def case_of(row: dict[str, Any]) -> Case:
    model, plan = row["model"], row["plan"]
    shape, tp, pp, dp = shape_of(model), plan["tp"], plan["pp"], plan["dp"]
    microbatch = plan["microbatch"]
    return Case(
        shape=shape,
        kernels=Kernels(attention="flash", norm="rms", is_rotary=True, has_bias=False),
        accounting=megatron_2023(shape, num_tokens=microbatch * model["seq_len"], tp=tp, is_fp16=False),
        mesh=Mesh(dp=dp, tp=tp, pp=pp),
        layers_of=(shape.layers // pp,) * pp,
        sequence=model["seq_len"],
        microbatch=microbatch,
        num_microbatches=plan["global_batch"] // (microbatch * dp),
        zero=plan["zero"],
        recompute=plan["recompute"],
        schedule="1f1b",
        is_sequence_parallel=bool(plan["sp"]),
    )
