"""Holds predicted step times against published runs of dense models on A100 and H100.

Usage: python benchmarks/prediction_sanity/run.py [--only GROUP] [--rows]

Reads ``../shared/data/published-runs/runs.jsonl`` beside the project and skips cleanly where that is absent.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from shardstage.cluster import Cluster, load
from shardstage.cost import Folded, Links, StepSetup, balanced, fold, predict_step, profile
from shardstage.graph.capture import capture
from shardstage.graph.source import load_model
from shardstage.layout import Mesh

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "published-runs" / "runs.jsonl"
CAPTURED_LAYERS = 4
PRESETS = {"A100-80GB": "a100-80", "A100-40GB": "a100-40", "H100-80GB": "h100"}
# Schedules, precisions and attention kernels that we have no model of are left out.
DTYPES = (
    "bf16",
    "bf16-amp(fp32 master, bf16 compute)",
    "fp16/bf16 (dev)",
    "fp16/bf16 mixed",
    "fp16",
    "bf16+fp32 grad accum",
)
RECOMPUTES = {"none": "none", None: "none", "full": "full", "selective": "selective"}


def main() -> None:
    arguments = _arguments()
    if not DATA.exists():
        print("skipped: there is no ../shared/data/published-runs/runs.jsonl beside the project")
        return
    ratios: dict[str, list[float]] = defaultdict(list)
    for row in _usable_rows(arguments.only):
        predicted_s, mfu = _predict(row)
        measured_s = row["derived"].get("step_time_s") or row["measured"]["step_time_s"]
        ratios[f"{row['group']} {row['hardware']['gpu']}"].append(measured_s / predicted_s)
        if arguments.rows:
            print(
                f"{row['id']:70} {measured_s:8.3f} s {predicted_s:8.3f} s {measured_s / predicted_s:5.2f} mfu {mfu:.3f}"
            )
    print("| runs | number | measured / predicted: median | 10 % | 90 % |\n|---|---|---|---|---|")
    everything = [ratio for group in ratios.values() for ratio in group]
    for name, group in (*ratios.items(), ("all", everything)):
        low, middle, high = _quantiles(group)
        print(f"| {name} | {len(group)} | {middle:.2f} | {low:.2f} | {high:.2f} |")
    by_group = [statistics.median(group) for group in ratios.values()]
    print(f"\nmedian of the groups' medians: {statistics.median(by_group):.2f}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", default="", help="part of a group's name")
    parser.add_argument("--rows", action="store_true", help="print every run")
    return parser.parse_args()


def _usable_rows(only: str) -> Iterator[dict[str, Any]]:
    for line in DATA.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        plan = row["plan"]
        is_ours = (
            row["hardware"]["gpu"] in PRESETS
            and not row["model"].get("moe")
            and plan.get("cp") in (1, None)
            and plan.get("vpp") == 1
            and plan["schedule"] in (None, "1f1b")
            and plan["dtype"] in DTYPES
            and plan["recompute"] in RECOMPUTES
            and plan["zero"] in (0, 1, 2, 3)
            and "flash" in plan.get("attention_kernel", "flash")
            and plan["microbatch"]
            and row["model"]["heads"]
        )
        if "step_time" in row["usable_for"] and is_ours and only in row["group"]:
            yield row


def _predict(row: dict[str, Any]) -> tuple[float, float]:
    """Step seconds and MFU."""
    model, plan = row["model"], row["plan"]
    folded = _unfolded(_captured(_config(model)), model["layers"])
    mesh = Mesh(dp=plan["dp"], tp=plan["tp"], pp=plan["pp"])
    cluster = _cluster(row["hardware"]["gpu"], mesh.world_size)
    share = -(-plan["global_batch"] // mesh.dp)
    num_microbatches = -(-share // plan["microbatch"])
    microbatch = -(-share // num_microbatches)
    priced = profile(
        folded,
        cluster,
        tp=mesh.tp,
        microbatch=microbatch,
        sequence=model["seq_len"],
        is_sequence_parallel=bool(plan["sp"]),
    )
    setup = StepSetup(
        mesh=mesh,
        starts=balanced([unit.forward_s + unit.backward_s for unit in priced.units], mesh.pp),
        microbatch=microbatch,
        num_microbatches=num_microbatches,
        global_batch=plan["global_batch"],
        sequence=model["seq_len"],
        zero=plan["zero"],
        recompute=RECOMPUTES[plan["recompute"]],  # type: ignore[arg-type]
        schedule="1f1b",
        precision="bfloat16",
        bucket_bytes=200 * 2**20,  # of the order of Megatron's and DeepSpeed's defaults
    )
    prediction = predict_step(priced, setup, Links(cluster, mesh))
    return prediction.step_time_s, prediction.mfu


@cache
def _cluster(gpu: str, num_devices: int) -> Cluster:
    return load(f"{PRESETS[gpu]}:{num_devices}")


def _config(model: dict[str, Any]) -> str:
    """A Hugging Face config of the row's model with few layers, as text."""
    if model["mlp_mats"] == 3:
        return json.dumps(
            {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "hidden_size": model["hidden"],
                "intermediate_size": model["ffn_hidden"],
                "num_hidden_layers": CAPTURED_LAYERS,
                "num_attention_heads": model["heads"],
                "num_key_value_heads": model["kv_heads"],
                "vocab_size": model["vocab"],
                "max_position_embeddings": 65536,
                "tie_word_embeddings": bool(model["tied_embeddings"]),
            }
        )
    return json.dumps(
        {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "n_embd": model["hidden"],
            "n_inner": model["ffn_hidden"],
            "n_layer": CAPTURED_LAYERS,
            "n_head": model["heads"],
            "vocab_size": model["vocab"],
            "n_positions": 65536,
            **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
        }
    )


@cache
def _captured(config: str) -> Folded:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(config, encoding="utf-8")
        return fold(capture(load_model(str(path)), sequence=2048, dtype="bfloat16"))


def _unfolded(folded: Folded, num_layers: int) -> Folded:
    """The same model with more layers: the last layer's unit is repeated."""
    last = max(i for i, unit in enumerate(folded.units) if "." in unit.module and unit.module[-1].isdigit())
    more = (folded.units[last],) * (num_layers - CAPTURED_LAYERS)
    return replace(folded, units=(*folded.units[: last + 1], *more, *folded.units[last + 1 :]))


def _quantiles(values: list[float]) -> tuple[float, float, float]:
    """10 %, 50 % and 90 %."""
    ordered = sorted(values)
    low, middle, high = (ordered[round(q * (len(ordered) - 1))] for q in (0.1, 0.5, 0.9))
    return low, middle, high


if __name__ == "__main__":
    main()
