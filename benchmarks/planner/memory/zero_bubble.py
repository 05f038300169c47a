"""Zero Bubble (Qi et al. 2023, tables 3 and 4): the largest peak of all stages, in whole GB."""

from __future__ import annotations

from functools import cache
from typing import Any

from cases import Case
from megatron import megatron_2023
from models import Kernels
from published import shape_of
from schedules import zb_2p

from shardstage.layout import Mesh
from shardstage.schedule import Schedule, make_schedule

__all__ = ["case_of"]


def case_of(row: dict[str, Any]) -> Case:
    model, plan = row["model"], row["plan"]
    pp, vpp, name = plan["pp"], plan["vpp"], plan["schedule"]
    each = (model["layers"] + 2) // (pp * vpp)
    m = plan["num_microbatches"]
    return Case(
        shape=shape_of(model),
        kernels=Kernels(attention="fused-softmax", dropout=0.1),
        accounting=megatron_2023(
            shape_of(model), num_tokens=plan["microbatch"] * model["seq_len"], tp=1, is_fp16=True
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
