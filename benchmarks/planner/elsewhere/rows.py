"""``runs.toml`` and ``later.toml`` as rows that ``published.job_of`` takes."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from software import layers_of

__all__ = ["SETS", "rows"]

SETS = ("runs", "later")
MEASURED = ("step_s", "tokens_per_s", "tflops", "flops_per_token", "peak_gib")


def rows(name: str = "runs") -> Iterator[dict[str, Any]]:
    """Every run of a set with its group's name and software."""
    found = tomllib.loads(Path(__file__).with_name(f"{name}.toml").read_text(encoding="utf-8"))
    for group in found["group"]:
        for own in group["run"]:
            run = group.get("all", {}) | own
            model = {"tied_embeddings": False} | found["model"][run["model"]]
            yield _row(group, run, model | {k: run[k] for k in ("layers",) if k in run})


def _row(group: dict[str, Any], run: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    sizes = {axis: run.get(axis, 1) for axis in ("dp", "tp", "pp", "cp", "vpp")}
    assert sizes["dp"] * sizes["tp"] * sizes["pp"] * sizes["cp"] == run["gpus"], run["id"]
    plan = {k: v for k, v in run.items() if k not in (*MEASURED, "id", "model", "sequence", "gpus", "layers")}
    cut = layers_of(group["software"], model, sizes["pp"])
    return {
        "id": run["id"],
        "group": group["name"],
        "software": group["software"],
        "peak": group.get("peak"),
        "model": model | {"seq_len": run["sequence"]},
        "hardware": {
            "gpu": group["gpu"],
            "gpus": run["gpus"],
            "gpus_per_node": 8,
            "inter_bw_GBs_per_gpu": group.get("network_GBs_per_gpu"),
            "device": group.get("device", {}),
        },
        "plan": {"sp": False, "schedule": None, "layers_of": cut} | plan | sizes,
        "measured": {"step_time_s": _step_s(run), "peak_bytes": run.get("peak_gib", 0) * 2**30},
    }


def _step_s(run: dict[str, Any]) -> float:
    if "step_s" in run:
        return float(run["step_s"])
    tokens_per_s = (
        run["tokens_per_s"] if "tokens_per_s" in run else 1e12 * run["tflops"] / run["flops_per_token"]
    )
    return float(run["global_batch"] * run["sequence"] / (run["gpus"] * tokens_per_s))
