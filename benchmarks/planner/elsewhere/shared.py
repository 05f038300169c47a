"""Holds predicted step times against the shared data's runs whose recomputation is not in the table, under each that may have been.

IBM's say how many of their layers are computed again by two utilisations that they print, with and without that; Pax's configurations say
their policy; Megatron's of January 2021 say neither the microbatch nor how ranks were dealt out.

Usage: python benchmarks/planner/elsewhere/shared.py
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from frameworks import H100_PRODUCTS_OF_2023, Framework, framework_of
from models import Kernels
from published import DATA, MEGATRON_RECOMPUTE, job_of, measured_s, predict, rows
from software import FSDP

Case = tuple[dict[str, Any], Framework]
MICROBATCHES = (1, 2, 4)
PAX_POLICIES = {"126m": "none", "5b": MEGATRON_RECOMPUTE, "175b": "full"}
"""github.com/google/paxml paxml/contrib/gpu/scripts_gpu/configs.py @04516ac8: GPT5B saves products of no batch dimension, so all but
attention's; GPT175B says nothing, and its layers repeat: SAVE_NOTHING (tasks/lm/params/c4.py); GPT126M's do not repeat."""


def main() -> None:
    if not DATA.exists():
        print("skipped: there is no ../shared/data beside the project")
        return
    print(
        "| run | measured | recomputation, or microbatch, that its source implies | others that may have been |\n|---|---|---|---|"
    )
    for cases in (_ibm, _pax, _megatron_2021):
        for row, implied, others in cases():
            told = "; ".join(f"{name} {_error(case, row)}" for name, case in implied.items())
            rest = "; ".join(f"{name} {_error(case, row)}" for name, case in others.items())
            print(f"| {row['id']} | {measured_s(row):.2f} s | {told or 'none'} | {rest} |", flush=True)


def _error(case: Case, row: dict[str, Any]) -> str:
    return f"{100 * (predict(job_of(*case)).step_time_s / measured_s(row) - 1):+.1f} %"


def _ibm() -> Iterator[tuple[dict[str, Any], Mapping[str, Case], Mapping[str, Case]]]:
    """FLOPs with recomputation over those without are 1 + the share of layers recomputed / 3, as printed, in whole percents."""
    for row in rows("ibm-fms-fsdp"):
        if row["plan"]["recompute"] == "none":
            continue
        layers, measured = row["model"]["layers"], row["measured"]
        least, most = (
            min(layers, round(3 * layers * ((measured["hfu"] + half) / (measured["mfu"] - half) - 1)))
            for half in (-0.005, 0.005)
        )
        middle = min(layers, round(3 * layers * (measured["hfu"] / measured["mfu"] - 1)))
        yield (
            row,
            {f"full:{middle}": _recomputing(row, f"full:{middle}")},
            {name: _recomputing(row, name) for name in (f"full:{least}", f"full:{most}")},
        )


def _recomputing(row: dict[str, Any], recompute: str) -> Case:
    return row | {"plan": row["plan"] | {"recompute": recompute}}, framework_of(row)


def _pax() -> Iterator[tuple[dict[str, Any], Mapping[str, Case], Mapping[str, Case]]]:
    """Attention is not fused by either: Transformer Engine's was where NVTE_FUSED_ATTN said so, which was 0 (github.com/NVIDIA/
    TransformerEngine transformer_engine/jax/flax/transformer.py of 2023), and else has a kernel for its softmax."""
    for row in rows("jax-pax"):
        plan = row["plan"]
        if "fp8" in plan["dtype"]:
            continue
        framework = Framework(
            kernels=Kernels(attention="fused-softmax" if plan["dtype"].startswith("te") else "written-out"),
            is_compiled=True,
            execution=FSDP,
            products_ratio=H100_PRODUCTS_OF_2023 if row["hardware"]["gpu"] == "H100-80GB" else 1.0,
        )
        made = {
            name: (row | {"plan": plan | {"recompute": name}}, framework)
            for name in ("none", MEGATRON_RECOMPUTE, "full")
        }
        policy = PAX_POLICIES[row["id"].split("-")[2]]
        yield row, {policy: made.pop(policy)}, made


def _megatron_2021() -> Iterator[tuple[dict[str, Any], Mapping[str, Case], Mapping[str, Case]]]:
    for row in rows("megatron-readme-2021"):
        framework = replace(framework_of(row), bucket_bytes=200 * 2**20)
        yield (
            row,
            {},
            {
                f"microbatch {each}": (row | {"plan": row["plan"] | {"microbatch": each}}, framework)
                for each in MICROBATCHES
            },
        )


if __name__ == "__main__":
    main()
